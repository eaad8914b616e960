//! The OpenAPI document, made from the handlers themselves.
//!
//! A new route has `#[utoipa::path(...)]` on its handler, the handler's name in the list below, and its types derive
//! `ToSchema`; what all routes have in common (scopes, errors, names of operations) is added here. Then renew the copy that
//! is reviewed: `cargo run -- openapi > docs/openapi.json`. A test compares it, and the routes with those that are served.

use actix_web::web;
use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Ref, RefOr};

use super::error::ErrorAnswer;
use super::{
    ROUTES, completions, config, events, files, health, jobs, measure, models, observe, page, plan, stream, trace,
    upload,
};

/// Name of the way in which requests show a token.
const TOKEN: &str = "token";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "patrickstar",
        description = "Training as a service. Routes under /v1 have the shape of OpenAI's fine-tuning API; those under \
                       /v1/patrickstar are this service's own.",
    ),
    paths(
        document,
        page::live,
        health::live,
        health::ready,
        measure::metrics,
        models::list,
        models::retrieve,
        completions::text,
        completions::chat,
        upload::create,
        files::list,
        files::retrieve,
        files::delete,
        files::content,
        jobs::create,
        jobs::list,
        jobs::retrieve,
        jobs::cancel,
        jobs::pause,
        jobs::resume,
        events::events,
        events::checkpoints,
        plan::plan,
        stream::stream,
        observe::chunks,
        observe::actors,
        trace::start,
        trace::stop,
        trace::download,
        config::show,
        config::change,
    ),
    components(schemas(ErrorAnswer))
)]
struct Handlers;

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "document", responses((status = 200, body = Object)))]
pub(super) async fn document() -> web::Json<utoipa::openapi::OpenApi> {
    web::Json(openapi())
}

/// What is served, for programs.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = Handlers::openapi();
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    document.components.get_or_insert_default().add_security_scheme(TOKEN, bearer);
    for entry in ROUTES {
        let item = document.paths.paths.get_mut(entry.path);
        let Some(operation) = item.and_then(|item| operation(item, entry.method.as_str())) else { continue };
        operation.operation_id = Some(operation_id(entry.method.as_str(), entry.path));
        if let Some(scope) = entry.scope {
            operation.security = Some(vec![SecurityRequirement::new(TOKEN, [scope.name()])]);
        }
        operation.responses.responses.insert("default".to_owned(), refusal());
    }
    document
}

fn operation<'a>(item: &'a mut PathItem, method: &str) -> Option<&'a mut Operation> {
    match method {
        "GET" => item.get.as_mut(),
        "PUT" => item.put.as_mut(),
        "POST" => item.post.as_mut(),
        "DELETE" => item.delete.as_mut(),
        _ => None,
    }
}

/// `get_v1_files_id_content`: a path and method are said once, so this is unique.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(|letter: char| !letter.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.fold(method.to_lowercase(), |name, word| format!("{name}_{word}"))
}

fn refusal() -> RefOr<utoipa::openapi::Response> {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
    let text = "Refused: `docs/API.md` lists the statuses.";
    ResponseBuilder::new().description(text).content("application/json", body).build().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_routes_that_are_served_and_no_others() {
        let document = serde_json::to_value(openapi()).unwrap();
        let mut documented: Vec<(String, String)> = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            let methods =
                item.as_object().unwrap().keys().filter(|key| !["summary", "parameters"].contains(&key.as_str()));
            documented.extend(methods.map(|method| (path.clone(), method.to_uppercase())));
        }
        let mut served: Vec<(String, String)> =
            ROUTES.iter().map(|entry| (entry.path.to_owned(), entry.method.to_string())).collect();
        documented.sort();
        served.sort();
        assert_eq!(documented, served);
        assert!(document.to_string().contains("\"security\":[{\"token\":[\"write\"]}]"));
    }

    #[test]
    fn the_copy_in_docs_is_fresh() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        let kept: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let fresh = serde_json::to_value(openapi()).unwrap();
        assert!(kept == fresh, "run `cargo run -- openapi > docs/openapi.json`");
    }
}
