//! As much of PromQL as the tests have to understand.

/// Words of an expression that name metrics of ours or recorded series, with what follows each.
pub fn names(expression: &str) -> Vec<(&str, &str)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(start) = rest.find(is_word) {
        let word = &rest[start..];
        let end = word.find(|c| !is_word(c)).unwrap_or(word.len());
        let (name, after) = word.split_at(end);
        if ["patrickstar_", "process_"].iter().any(|prefix| name.starts_with(prefix)) || name.contains(':') {
            found.push((name, after));
        }
        rest = after;
    }
    found
}

/// The parts of an alert's expression, with comparisons that answer 0 where they would answer nothing: an alert that is
/// silent because all is well has data then, and one that is silent because it asks for what nobody exports has not.
pub fn answerable(alert: &str) -> Vec<String> {
    alert.split(" or ").map(always_answering).collect()
}

fn always_answering(expression: &str) -> String {
    let (mut changed, mut in_braces) = (String::new(), false);
    let mut characters = expression.chars().peekable();
    while let Some(c) = characters.next() {
        changed.push(c);
        in_braces = (in_braces || c == '{') && c != '}';
        if in_braces || !"<>=!".contains(c) {
            continue;
        }
        if let Some(equals) = characters.next_if_eq(&'=') {
            changed.push(equals);
        }
        changed.push_str(" bool");
    }
    changed
}

#[test]
fn comparisons_answer_and_matchers_stay() {
    let alert = "up{job=\"a\", x!~\"b>c\"} == 0 and y >= 1 or z < 2";
    assert_eq!(answerable(alert), ["up{job=\"a\", x!~\"b>c\"} == bool 0 and y >= bool 1", "z < bool 2"]);
    assert_eq!(names("sum by (le) (rate(process_a{x=\"1\"}[5m]))"), [("process_a", "{x=\"1\"}[5m]))")]);
}
