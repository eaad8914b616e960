//! The service over HTTP: OpenAI's fine-tuning routes, and our own under `/v1/patrickstar`.
//!
//! [`ROUTES`] is the only list of what is answered. The server is built from it and the guard asks it which scope a route
//! needs, so a route that is not in it does not exist and one that is cannot be open by mistake. Each is described in
//! [`document`].

mod completions;
mod config;
mod document;
mod error;
mod events;
mod files;
mod guard;
mod health;
mod jobs;
mod measure;
mod models;
mod observe;
mod pace;
mod page;
mod params;
mod peer;
mod plan;
mod stream;
mod tail;
mod trace;
mod upload;
mod view;

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::Method;
use actix_web::middleware::from_fn;
use actix_web::{App, HttpRequest, HttpResponse, HttpServer, Route, web};
use tokio::sync::watch;

use super::error::ServiceError;
use super::live::Live;
use super::samplers::Samplers;
use super::settings::Settings;
use super::store::StoreHandle;
use super::supervisor::SupervisorHandle;
use super::tokens::Scope;

pub use document::openapi;
pub(super) use tail::Tails;

/// What every handler may use.
pub(super) struct State {
    pub settings: Arc<Settings>,
    pub store: StoreHandle,
    pub supervisor: SupervisorHandle,
    pub samplers: Samplers,
    pub tails: Tails,
    pub live: Arc<Live>,
    /// Turns true when the service begins to end.
    pub stopping: watch::Receiver<bool>,
}

/// A route.
struct Entry {
    method: Method,
    path: &'static str,
    /// What a token needs; `None` is open to everybody.
    scope: Option<Scope>,
    handler: fn() -> Route,
}

const fn entry(method: Method, path: &'static str, scope: Scope, handler: fn() -> Route) -> Entry {
    Entry { method, path, scope: Some(scope), handler }
}

const fn open(path: &'static str, handler: fn() -> Route) -> Entry {
    Entry { method: Method::GET, path, scope: None, handler }
}

/// Every route.
static ROUTES: &[Entry] = &[
    open("/", || web::get().to(page::live)),
    open("/livez", || web::get().to(health::live)),
    open("/readyz", || web::get().to(health::ready)),
    entry(Method::GET, "/metrics", Scope::Read, || web::get().to(measure::metrics)),
    entry(Method::GET, "/openapi.json", Scope::Read, || web::get().to(document::document)),
    entry(Method::GET, "/v1/models", Scope::Read, || web::get().to(models::list)),
    entry(Method::GET, "/v1/models/{id}", Scope::Read, || web::get().to(models::retrieve)),
    entry(Method::POST, "/v1/completions", Scope::Write, || web::post().to(completions::text)),
    entry(Method::POST, "/v1/chat/completions", Scope::Write, || web::post().to(completions::chat)),
    entry(Method::POST, "/v1/files", Scope::Write, || web::post().to(upload::create)),
    entry(Method::GET, "/v1/files", Scope::Read, || web::get().to(files::list)),
    entry(Method::GET, "/v1/files/{id}", Scope::Read, || web::get().to(files::retrieve)),
    entry(Method::DELETE, "/v1/files/{id}", Scope::Write, || web::delete().to(files::delete)),
    entry(Method::GET, "/v1/files/{id}/content", Scope::Read, || web::get().to(files::content)),
    entry(Method::POST, "/v1/fine_tuning/jobs", Scope::Write, || web::post().to(jobs::create)),
    entry(Method::GET, "/v1/fine_tuning/jobs", Scope::Read, || web::get().to(jobs::list)),
    entry(Method::GET, "/v1/fine_tuning/jobs/{id}", Scope::Read, || web::get().to(jobs::retrieve)),
    entry(Method::POST, "/v1/fine_tuning/jobs/{id}/cancel", Scope::Write, || web::post().to(jobs::cancel)),
    entry(Method::POST, "/v1/fine_tuning/jobs/{id}/pause", Scope::Write, || web::post().to(jobs::pause)),
    entry(Method::POST, "/v1/fine_tuning/jobs/{id}/resume", Scope::Write, || web::post().to(jobs::resume)),
    entry(Method::GET, "/v1/fine_tuning/jobs/{id}/events", Scope::Read, || web::get().to(events::events)),
    entry(Method::GET, "/v1/fine_tuning/jobs/{id}/checkpoints", Scope::Read, || web::get().to(events::checkpoints)),
    entry(Method::POST, "/v1/patrickstar/plan", Scope::Read, || web::post().to(plan::plan)),
    entry(Method::GET, "/v1/patrickstar/jobs/{id}/stream", Scope::Read, || web::get().to(stream::stream)),
    entry(Method::GET, "/v1/patrickstar/jobs/{id}/chunks", Scope::Read, || web::get().to(observe::chunks)),
    entry(Method::GET, "/v1/patrickstar/actors", Scope::Read, || web::get().to(observe::actors)),
    entry(Method::POST, "/v1/patrickstar/trace/start", Scope::Write, || web::post().to(trace::start)),
    entry(Method::POST, "/v1/patrickstar/trace/stop", Scope::Write, || web::post().to(trace::stop)),
    entry(Method::GET, "/v1/patrickstar/trace", Scope::Read, || web::get().to(trace::download)),
    entry(Method::GET, "/v1/patrickstar/config", Scope::Read, || web::get().to(config::show)),
    entry(Method::PUT, "/v1/patrickstar/config", Scope::Admin, || web::put().to(config::change)),
];

/// A server that listens already and answers once it is awaited.
pub(super) fn server(state: State) -> Result<(actix_web::dev::Server, std::net::SocketAddr), ServiceError> {
    let listen = state.settings.listen;
    let json = state.settings.limits.json;
    let state = web::Data::new(state);
    let server = HttpServer::new(move || {
        let app = App::new()
            .app_data(state.clone())
            .app_data(web::JsonConfig::default().limit(json).error_handler(error::json))
            .wrap(from_fn(guard::guard))
            .wrap(from_fn(measure::measure));
        resources().into_iter().fold(app, |app, resource| app.service(resource)).default_service(web::to(no_route))
    })
    .on_connect(peer::note)
    .workers(2)
    // Whoever is slower with the head of a request gets 408; `pace` sees to the body.
    .client_request_timeout(Duration::from_secs(5))
    .max_connections(2048)
    .disable_signals()
    .shutdown_timeout(5)
    .bind(listen)
    .map_err(|error| ServiceError::Setup(format!("cannot listen on {listen}: {error}: choose another --listen")))?;
    let address = server.addrs().first().copied().unwrap_or(listen);
    Ok((server.run(), address))
}

/// One resource a path, answering the methods that [`ROUTES`] names.
fn resources() -> Vec<actix_web::Resource> {
    let mut paths: Vec<&str> = ROUTES.iter().map(|entry| entry.path).collect();
    paths.dedup();
    let resource = |path: &str| {
        let resource = web::resource(path).default_service(web::to(no_method));
        ROUTES
            .iter()
            .filter(|entry| entry.path == path)
            .fold(resource, |resource, entry| resource.route((entry.handler)()))
    };
    paths.into_iter().map(resource).collect()
}

async fn no_route(request: HttpRequest) -> Result<HttpResponse, ServiceError> {
    Err(ServiceError::NoRoute(request.path().chars().take(200).collect()))
}

async fn no_method(request: HttpRequest) -> Result<HttpResponse, ServiceError> {
    Err(ServiceError::Method(request.method().as_str().chars().take(32).collect()))
}
