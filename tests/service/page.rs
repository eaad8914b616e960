//! The page at `/` as it leaves the service. What it does in a browser is tried in `tests/browser`.

use crate::client::Service;

#[test]
fn the_page_runs_only_under_its_own_number() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start_with(data.path(), &[], Some("a-token-that-is-not-sent"));
    service.token = None;
    let pages = [service.get("/"), service.get("/")];
    let numbers = pages.map(|page| {
        assert_eq!(page.status, 200);
        let policy = page.head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
        assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
        let number = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap().to_owned();
        let html = String::from_utf8(page.body).unwrap();
        assert_eq!(html.matches(&format!(" nonce=\"{number}\"")).count(), 2);
        assert_eq!(html.matches("<script").count() + html.matches("<style").count(), 2);
        number
    });
    assert_ne!(numbers[0], numbers[1]);
    // It is open, what it asks for is not.
    service.get("/v1/fine_tuning/jobs").error(401);
}
