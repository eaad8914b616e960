//! Joins the texts of several registries into one: a family may be described once only, and its series stand together.

use std::collections::BTreeMap;

#[derive(Default)]
struct Merged<'a> {
    /// `# HELP` and `# TYPE`, from whoever came first.
    head: Vec<&'a str>,
    series: Vec<&'a str>,
}

/// The series of all `texts`, family by family. Two texts must not hold the same series: every job's carry its `job_id`.
pub fn merge<T: AsRef<str>>(texts: &[T]) -> String {
    let mut families: BTreeMap<&str, Merged<'_>> = BTreeMap::new();
    for text in texts {
        let mut described = "";
        let mut first_of_family = false;
        for line in text.as_ref().lines().filter(|line| !line.is_empty()) {
            let head = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
            if let Some(name) = head.and_then(|rest| rest.split(' ').next()) {
                if name != described {
                    described = name;
                    first_of_family = !families.contains_key(name);
                }
                let family = families.entry(name).or_default();
                if first_of_family {
                    family.head.push(line);
                }
            } else if !line.starts_with('#') {
                // The exporter writes a family's series right below its head, `_bucket` and such too.
                families.entry(described).or_default().series.push(line);
            }
        }
    }
    let mut merged = String::new();
    for line in families.into_values().flat_map(|family| family.head.into_iter().chain(family.series)) {
        merged.push_str(line);
        merged.push('\n');
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_described_once_and_keeps_its_series_together() {
        let service = "# HELP a_total A.\n# TYPE a_total counter\na_total 1\n\n# HELP t Times.\n# TYPE t histogram\nt_bucket{le=\"+Inf\"} 1\nt_sum 2\nt_count 1\n";
        let worker = "# HELP t Times.\n# TYPE t histogram\nt_sum{job_id=\"1\"} 3\n\n# HELP b B.\n# TYPE b gauge\nb{job_id=\"1\"} 4\n";
        let expected = "# HELP a_total A.\n# TYPE a_total counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb{job_id=\"1\"} 4\n\
                        # HELP t Times.\n# TYPE t histogram\nt_bucket{le=\"+Inf\"} 1\nt_sum 2\nt_count 1\nt_sum{job_id=\"1\"} 3\n";
        assert_eq!(merge(&[service, worker]), expected);
        assert_eq!(merge(&[service, ""]), merge(&[service]));
        assert_eq!(merge::<&str>(&[]), "");
    }
}
