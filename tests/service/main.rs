//! The service from outside: the real program on a free port, with real workers.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test
#![allow(clippy::print_stdout)] // the test runner shows what a service said, if the test fails

mod cli;
mod client;
mod clients;
mod completions;
mod config;
mod crash;
mod hostile;
mod jobs;
mod kills;
mod layers;
mod models;
mod observe;
mod page;
mod refusals;
mod routes;
mod shutdown;
#[path = "../sources/mod.rs"]
mod sources;
mod supervision;
mod worker;
