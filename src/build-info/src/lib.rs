//! What a program is built from.

/// The commit that was checked out, as git names it in full; what `PATRICKSTAR_REVISION` said at build time where that was
/// set; "unknown" where neither knows. Changes that are not committed are not seen.
pub const REVISION: &str = env!("PATRICKSTAR_REVISION");

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::REVISION;

    /// What the build was told.
    const GIVEN: Option<&str> = option_env!("GIVEN_REVISION");

    /// Fails too when a commit did not make cargo look again.
    #[test]
    fn the_revision_is_the_commit_that_is_checked_out() {
        if GIVEN.is_some() {
            return assert_eq!(Some(REVISION), GIVEN);
        }
        let git = |arguments: &[&str]| {
            let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success());
            output.map(|output| String::from_utf8(output.stdout).unwrap().trim().to_owned())
        };
        let package = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = package.ancestors().nth(2).unwrap().canonicalize().unwrap();
        let own = git(&["rev-parse", "--show-toplevel"]).is_some_and(|top| std::path::Path::new(&top) == root);
        let commit = if own { git(&["rev-parse", "HEAD"]) } else { None };
        assert_eq!(REVISION, commit.as_deref().unwrap_or("unknown"));
    }
}
