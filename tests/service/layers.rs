//! Which part may know which.

use std::path::Path;

use crate::sources::sources;

#[test]
fn only_the_service_knows_http_and_the_database() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, &mut found);
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        let place = path.strip_prefix(&root).unwrap();
        for (name, home) in [
            ("actix_web", "service"),
            ("actix_multipart", "service/api"),
            ("rusqlite", "service/store"),
            ("ureq", "client"),
        ] {
            assert!(!text.contains(name) || place.starts_with(home), "{} names {name}", place.display());
        }
        let below =
            ["train", "model", "plan", "data", "checkpoint", "config"].iter().any(|part| place.starts_with(part));
        assert!(!below || !text.contains("crate::service"), "{} knows the service", place.display());
    }
}
