//! Query parameters of lists, read by hand: clients send `metadata[team]=a`, and every mistake should be named.

use std::str::FromStr;

use actix_web::{HttpRequest, web};
use utoipa::IntoParams;

use crate::service::error::ServiceError;
use crate::service::store::{MetadataFilter, StoreError};

/// The parameters of every list, for the document.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "read by hand, see above")]
pub(super) struct Page {
    /// Most items of the page.
    #[param(minimum = 1)]
    limit: Option<u32>,
    /// Last id of the page before.
    after: Option<String>,
}

/// The query of a request.
pub(super) struct Params(Vec<(String, String)>);

impl Params {
    pub fn of(request: &HttpRequest) -> Result<Self, ServiceError> {
        let pairs = web::Query::<Vec<(String, String)>>::from_query(request.query_string());
        let pairs =
            pairs.map_err(|error| ServiceError::invalid("query", format!("the query is unreadable: {error}")))?;
        Ok(Params(pairs.into_inner()))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The id that a page begins after. A wrong one is refused: a client that is sent the first page again never ends.
    pub fn after<I: FromStr<Err = StoreError>>(&self) -> Result<Option<I>, ServiceError> {
        let after = self.get("after").filter(|after| !after.is_empty());
        let parsed = after.map(|after| after.parse::<I>()).transpose();
        parsed.map_err(|error| ServiceError::invalid("after", error.to_string()))
    }

    pub fn limit(&self, default: usize, most: usize) -> Result<usize, ServiceError> {
        let Some(text) = self.get("limit") else { return Ok(default) };
        let limit = text.parse().ok().filter(|limit| (1..=most).contains(limit));
        limit.ok_or_else(|| ServiceError::invalid("limit", format!("`limit` must be from 1 to {most}")))
    }

    pub fn metadata(&self) -> MetadataFilter {
        let pairs: Vec<(String, String)> = self
            .0
            .iter()
            .filter_map(|(key, value)| {
                let key = key.strip_prefix("metadata[")?.strip_suffix(']')?;
                Some((key.to_owned(), value.clone()))
            })
            .collect();
        if !pairs.is_empty() {
            MetadataFilter::Pairs(pairs)
        } else if self.get("metadata") == Some("null") {
            MetadataFilter::Absent
        } else {
            MetadataFilter::Any
        }
    }
}

/// An id in a path; one of the wrong form names nothing.
pub(super) fn id<I: FromStr>(what: &'static str, text: &str) -> Result<I, ServiceError> {
    text.parse().map_err(|_| ServiceError::NotFound { what, id: text.chars().take(64).collect() })
}
