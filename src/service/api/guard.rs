//! What every request passes first: where it came from, and whose token it brings.
//!
//! A page in somebody's browser can send requests to this machine. Its requests carry the page's origin, and if it lured the
//! browser here by a name of its own, that name as the host: both are refused, whatever the method.

use std::net::IpAddr;

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, ORIGIN};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpResponse, web};

use super::error::envelope;
use super::pace::paced;
use super::{ROUTES, State};
use crate::service::error::ServiceError;
use crate::service::rate::Client;
use crate::service::settings::Settings;
use crate::service::tokens::Scope;
use crate::telemetry::metrics::{Counter, count};

/// Refuses, or lets the request through and gives errors the shape that clients read.
pub(super) async fn guard<B: MessageBody>(
    mut request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    check(&request)?;
    let payload = request.take_payload();
    request.set_payload(paced(payload));
    let response = next.call(request).await?;
    let status = response.status();
    let is_json =
        response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if !(status.is_client_error() || status.is_server_error()) || is_json {
        return Ok(response.map_into_left_body());
    }
    // The framework refused by itself, in plain text.
    let reason = response.response().error().map(ToString::to_string);
    let message = reason.unwrap_or_else(|| status.canonical_reason().unwrap_or("refused").to_lowercase());
    let body = HttpResponse::build(status).json(envelope(status, &message, None, Some("bad_request")));
    Ok(response.into_response(body).map_into_right_body())
}

fn check(request: &ServiceRequest) -> Result<(), ServiceError> {
    let state = request.app_data::<web::Data<State>>();
    let state = state.ok_or_else(|| ServiceError::Internal("the server has no state".into()))?;
    let host = check_host(request.headers(), &state.settings)?;
    check_origin(request.headers(), &host)?;
    // What is not in the table is told so only to those who may look.
    let pattern = request.match_pattern();
    let route = ROUTES.iter().find(|route| Some(route.path) == pattern.as_deref() && route.method == request.method());
    match route.map_or(Some(Scope::Read), |route| route.scope) {
        None => Ok(()),
        Some(needed) => {
            let bearer = bearer(request.headers(), &state.settings);
            // Whoever tries tokens is counted too, by address.
            let address = request.peer_addr().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.ip());
            let client = bearer.map_or(Client::Address(address), |(_, number)| Client::Token(number));
            state.live.rate.check(client).map_err(|wait| {
                count(Counter::RateLimited);
                ServiceError::TooMany { wait }
            })?;
            match bearer {
                // Only on loopback: `Settings::check` refuses to start otherwise.
                _ if state.settings.tokens.is_empty() => Ok(()),
                None => {
                    count(Counter::AuthFailures);
                    Err(ServiceError::Unauthorized)
                }
                Some((scope, _)) if scope >= needed => Ok(()),
                Some(_) => Err(ServiceError::Forbidden(needed.name())),
            }
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ServiceError> {
    let mut values = headers.get_all(name);
    let first = values.next();
    if values.next().is_some() {
        return Err(ServiceError::Origin(format!("more than one header {name}: send one")));
    }
    let readable = first.map(|value| value.to_str()).transpose();
    readable.map_err(|_| ServiceError::Origin(format!("the header {name} is not text")))
}

fn check_host(headers: &HeaderMap, settings: &Settings) -> Result<String, ServiceError> {
    let host = text(headers, &HOST)?.ok_or_else(|| ServiceError::Origin("the header host is missing".into()))?;
    let name = without_port(host);
    // No name server had a part in an address.
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let is_address = bare.parse::<IpAddr>().is_ok();
    let allowed = |known: &String| known.eq_ignore_ascii_case(name);
    if is_address || name.eq_ignore_ascii_case("localhost") || settings.allowed_hosts.iter().any(allowed) {
        return Ok(host.to_owned());
    }
    let name: String = name.chars().take(100).collect();
    Err(ServiceError::Origin(format!("the host name `{name}` is not allowed: start with --allowed-host {name}")))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn check_origin(headers: &HeaderMap, host: &str) -> Result<(), ServiceError> {
    let refused = || ServiceError::Origin("requests from pages of other origins are not allowed".into());
    if let Some(origin) = text(headers, &ORIGIN)? {
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if !authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host)) {
            return Err(refused());
        }
    }
    // Browsers send no origin with some requests, but say where those come from.
    let site = text(headers, &HeaderName::from_static("sec-fetch-site"))?;
    if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) { Err(refused()) } else { Ok(()) }
}

/// Whose token the request brings, if it is one that is known.
fn bearer(headers: &HeaderMap, settings: &Settings) -> Option<(Scope, usize)> {
    let token = text(headers, &AUTHORIZATION).ok()??.strip_prefix("Bearer ")?;
    settings.tokens.find(token.trim())
}
