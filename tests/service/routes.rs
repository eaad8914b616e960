//! Every route and method of the OpenAPI document, and every method that is not in it: who is let in.

use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::client::Service;

/// Routes that anybody may call.
const OPEN: [(&str, &str); 3] = [("GET", "/"), ("GET", "/livez"), ("GET", "/readyz")];
const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"];
/// From the smallest on.
const SCOPES: [&str; 3] = ["read", "write", "admin"];

/// A method of a path as the document has it.
pub struct Route {
    pub method: String,
    /// With names of things that do not exist in the place of parameters.
    pub path: String,
    /// What a token needs; `None` is open.
    pub scope: Option<String>,
}

/// Every route of the document.
pub fn routes() -> Vec<Route> {
    let document = serde_json::to_value(patrickstar::service::openapi()).unwrap();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let scope = operation.pointer("/security/0/token/0").and_then(Value::as_str).map(str::to_owned);
            routes.push(Route { method: method.to_uppercase(), path: filled(path), scope });
        }
    }
    routes
}

fn filled(path: &str) -> String {
    let kind = if path.contains("/files/") {
        "file-"
    } else if path.contains("/jobs/") {
        "ftjob-"
    } else {
        ""
    };
    path.replace("{id}", &format!("{kind}000000000000000000000000"))
}

/// A file with a token of each scope, named after it.
fn token_file(directory: &Path) -> String {
    let hash =
        |token: &str| Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines: Vec<String> = SCOPES.map(|scope| format!("{scope} sha256:{}\n", hash(scope))).into();
    let path = directory.join("tokens");
    std::fs::write(&path, lines.concat()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn status(service: &mut Service, token: Option<&str>, method: &str, path: &str) -> u16 {
    service.token = token.map(str::to_owned);
    service.request(method, path, &[("Content-Type", "application/json")], b"{}").status
}

#[test]
fn every_route_wants_a_token_of_its_scope() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start_with(data.path(), &["--token-file", &token_file(data.path())], None);
    let routes = routes();
    assert!(routes.len() >= 20);
    for Route { method, path, scope } in &routes {
        let Some(scope) = scope else {
            assert!(OPEN.contains(&(method, path)), "{method} {path} is open");
            assert_eq!(status(&mut service, None, method, path), 200, "{method} {path}");
            continue;
        };
        for wrong in [None, Some("a-token-that-nobody-gave-out"), Some("")] {
            assert_eq!(status(&mut service, wrong, method, path), 401, "{method} {path} with {wrong:?}");
        }
        let needed = SCOPES.iter().position(|known| known == scope).unwrap();
        for (index, given) in SCOPES.iter().enumerate() {
            let status = status(&mut service, Some(given), method, path);
            assert_eq!(status == 403, index < needed, "{method} {path} needs {scope}, with {given}: {status}");
            assert!(status != 401 && status < 500, "{method} {path} with {given}: {status}");
        }
    }
}

#[test]
fn methods_that_are_not_documented_are_not_answered() {
    let data = tempfile::tempdir().unwrap();
    let mut service = Service::start_with(data.path(), &["--token-file", &token_file(data.path())], None);
    let routes = routes();
    let mut paths: Vec<&str> = routes.iter().map(|route| route.path.as_str()).collect();
    paths.dedup();
    for path in paths {
        let documented = |method: &str| routes.iter().any(|route| route.path == path && route.method == method);
        for method in METHODS.into_iter().filter(|method| !documented(method)) {
            assert_eq!(status(&mut service, None, method, path), 401, "{method} {path}");
            assert_eq!(status(&mut service, Some("admin"), method, path), 405, "{method} {path}");
        }
    }
}
