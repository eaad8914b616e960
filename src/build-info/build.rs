//! Asks git which revision is checked out. Works without git, and in a tree that is no repository: then nobody knows.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const VARIABLE: &str = "PATRICKSTAR_REVISION";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let given = env::var(VARIABLE).ok().filter(|given| !given.is_empty());
    if let Some(given) = &given {
        println!("cargo::rustc-env=GIVEN_REVISION={given}");
    }
    let revision = given.or_else(revision).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env={VARIABLE}={revision}");
}

/// The commit that is checked out, if this is the repository's own tree and not an archive unpacked inside of another's.
fn revision() -> Option<String> {
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR")?).ancestors().nth(2)?.canonicalize().ok()?;
    let top = PathBuf::from(git(&root, &["rev-parse", "--show-toplevel"])?).canonicalize().ok()?;
    if top != root {
        return None;
    }
    watch(&root);
    git(&root, &["rev-parse", "HEAD"])
}

/// Cargo runs this again when another commit is checked out, and not before: the reflog of HEAD grows whenever HEAD moves,
/// by a commit or between branches. Where no reflog is kept, HEAD and its branch are watched instead.
fn watch(root: &Path) {
    let path =
        |name: &str| Some(root.join(git(root, &["rev-parse", "--git-path", name])?)).filter(|path| path.is_file());
    let files = match path("logs/HEAD") {
        Some(log) => vec![log],
        None => {
            let branch = git(root, &["symbolic-ref", "--quiet", "HEAD"]);
            [path("HEAD"), branch.and_then(|branch| path(&branch))].into_iter().flatten().collect()
        }
    };
    for file in files {
        println!("cargo::rerun-if-changed={}", file.display());
    }
}

/// The first line that git says.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    let said = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    said.lines().next().map(str::to_owned)
}
