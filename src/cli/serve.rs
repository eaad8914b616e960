//! `patrickstar serve`.

use std::process::ExitCode;
use std::time::Duration;

use super::args::ServeArgs;
use super::{CliError, output};
use crate::service::directories::ModelRoots;
use crate::service::settings::{Limits, Settings};
use crate::service::tokens::{TOKEN_VARIABLE, Tokens};

pub fn run(args: ServeArgs) -> Result<ExitCode, CliError> {
    let failed = |source: crate::service::error::ServiceError| CliError::Failed {
        doing: "the service stopped".into(),
        source: source.into(),
    };
    let token = std::env::var(TOKEN_VARIABLE).ok();
    let settings = Settings {
        listen: args.listen,
        data: args.data,
        config: args.config,
        watch_config: args.watch_config,
        allowed_hosts: args.allowed_host,
        model_roots: ModelRoots::open(&args.model_root).map_err(failed)?,
        sample_device: args.sample_device,
        tokens: Tokens::load(args.token_file.as_deref(), token.as_deref()).map_err(failed)?,
        limits: Limits {
            upload: args.max_upload.0,
            waiting_jobs: args.max_waiting,
            restarts: args.max_restarts,
            hang: (args.hang_timeout > 0).then(|| Duration::from_secs(args.hang_timeout)),
            samplers: args.max_samplers,
            ..Limits::default()
        },
    };
    crate::service::serve(settings, |address| output::note(&format!("listening on http://{address}")))
        .map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}
