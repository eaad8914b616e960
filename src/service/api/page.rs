//! The page that people see at `/`: jobs, curves, chunks and actors, live.
//!
//! It is one document without a build step that asks nobody but this service. It holds no data, so it is open; what it shows
//! it asks for as any client does, with the token that somebody gave it.

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};

use crate::service::error::ServiceError;

/// Stands where each answer has a number of its own.
const NONCE: &str = "{nonce}";

/// The parts in the order of the document.
const PARTS: [&str; 11] = [
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
     <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>patrickstar</title>\n\
     <link rel=\"icon\" href=\"data:,\">\n<style nonce=\"{nonce}\">\n",
    include_str!("page/page.css"),
    "</style>\n</head>\n<body>\n",
    include_str!("page/page.html"),
    "<script nonce=\"{nonce}\">\n\"use strict\";\n",
    include_str!("page/service.js"),
    include_str!("page/draw.js"),
    include_str!("page/jobs.js"),
    include_str!("page/actors.js"),
    include_str!("page/submit.js"),
    concat!(include_str!("page/main.js"), "</script>\n</body>\n</html>\n"),
];

/// The live page.
#[utoipa::path(get, path = "/", tag = "page", responses((status = 200, content_type = "text/html", body = String)))]
pub(super) async fn live() -> Result<HttpResponse, ServiceError> {
    let page = page()?;
    Ok(HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((CONTENT_SECURITY_POLICY, page.policy))
        .insert_header((X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((REFERRER_POLICY, "no-referrer"))
        // Its number must not be used again.
        .insert_header((CACHE_CONTROL, "no-store"))
        .body(page.html))
}

/// The document, and the policy under which a browser may show it.
struct Page {
    html: String,
    policy: String,
}

/// A page for one answer. Whatever a mistake let into it, the browser runs nothing without the answer's number, asks nobody
/// else, and makes no markup from text.
fn page() -> Result<Page, ServiceError> {
    let number = || getrandom::u64().map_err(|error| ServiceError::Internal(format!("no random numbers: {error}")));
    let nonce = format!("{:016x}{:016x}", number()?, number()?);
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    );
    Ok(Page { html: PARTS.concat().replace(NONCE, &nonce), policy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_asks_nobody_else() {
        let page = page().unwrap();
        assert!(!page.html.contains(NONCE) && page.html.len() > 20_000);
        for outside in
            ["http://", "https://", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", " src=\"", "style=\""]
        {
            assert!(!page.html.contains(outside), "{outside}");
        }
        assert_ne!(page.policy, super::page().unwrap().policy);
    }
}
