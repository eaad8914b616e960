//! Names of stored things, in the form that OpenAI clients know: a prefix that says what it names, then a number.

use std::fmt;
use std::str::FromStr;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use serde::Serialize;
use utoipa::ToSchema;

use super::StoreError;

/// Random bytes of a name: enough that nobody guesses one, and no two ever meet.
const RANDOM_BYTES: usize = 12;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal),+ $(,)?) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, ToSchema)]
        pub struct $name(String);

        impl $name {
            /// What every such name begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A name that nothing has yet.
            pub fn random() -> Result<Self, StoreError> {
                Ok($name(format!("{}{}", $prefix, random_hex()?)))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = StoreError;

            /// Accepts only what [`Self::random`] makes: a name may become part of a path.
            fn from_str(text: &str) -> Result<Self, StoreError> {
                let known = text.strip_prefix($prefix).is_some_and(is_hex);
                known.then(|| $name(text.to_owned())).ok_or_else(|| StoreError::BadId {
                    prefix: $prefix,
                    text: text.chars().take(64).collect(),
                })
            }
        }

        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                self.0.to_sql()
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                value.as_str()?.parse().map_err(|error| FromSqlError::Other(Box::new(error)))
            }
        }
    )+ };
}

ids! {
    /// Names a job.
    JobId = "ftjob-",
    /// Names an uploaded file, or one that a job made.
    FileId = "file-",
    /// Names an event of a job.
    EventId = "ftevent-",
    /// Names a checkpoint of a job.
    CheckpointId = "ftckpt-",
}

fn random_hex() -> Result<String, StoreError> {
    let mut bytes = [0u8; RANDOM_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| StoreError::Random(error.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn is_hex(text: &str) -> bool {
    text.len() == 2 * RANDOM_BYTES && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Position of a row in its table: rows are numbered in the order they were stored, and no number is used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Seq(pub i64);

impl ToSql for Seq {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

impl FromSql for Seq {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        i64::column_result(value).map(Seq)
    }
}

/// Seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
pub struct UnixTime(pub i64);

impl UnixTime {
    /// This second.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        // A clock before 1970 is wrong anyway.
        UnixTime(since.map_or(0, |since| since.as_secs() as i64))
    }

    /// So many seconds later.
    pub fn after(self, seconds: f64) -> Self {
        UnixTime(self.0.saturating_add(seconds.round() as i64))
    }
}

impl ToSql for UnixTime {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.0.to_sql()
    }
}

impl FromSql for UnixTime {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        i64::column_result(value).map(UnixTime)
    }
}
