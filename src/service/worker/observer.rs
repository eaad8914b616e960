//! Reports a session to the service, and hands it the policies that come back.

use std::collections::VecDeque;
use std::path::Path;

use patrickstar_actors::types::Step;

use super::Lines;
use super::protocol::{FromWorker, Policies, StepMetrics};
use super::responder::Shown;
use super::retune::Tuning;
use crate::config::Config;
use crate::error::Error;
use crate::service::store::Losses;
use crate::train::engine::{Engine, StepReport};
use crate::train::session::{Observer, Progress, Session};

/// The session's observer.
pub(super) struct Reporter {
    lines: Lines,
    retunes: flume::Receiver<Policies>,
    stored: flume::Receiver<u64>,
    shown: Shown,
    tuning: Tuning,
    last_stored: u64,
    last_sent: u64,
    total_steps: u64,
    tokens_per_step: u64,
    /// Of the last steps: a checkpoint is safe on disk some steps after the one that it holds.
    losses: VecDeque<(u64, Losses)>,
}

/// Steps that may pass while a checkpoint is written and still find their loss.
const REMEMBERED: usize = 4096;

impl Reporter {
    pub fn new(
        lines: Lines,
        config: &Config,
        retunes: flume::Receiver<Policies>,
        stored: flume::Receiver<u64>,
        shown: Shown,
    ) -> Self {
        let tokens_per_step = (config.train.batch * config.train.seq_len) as u64;
        Reporter {
            lines,
            retunes,
            stored,
            shown,
            tuning: Tuning::new(config),
            last_stored: 0,
            last_sent: 0,
            total_steps: config.train.steps,
            tokens_per_step,
            losses: VecDeque::new(),
        }
    }

    pub fn send(&self, message: &FromWorker) {
        self.lines.send(message);
    }

    /// Tells where the session begins. A checkpoint that was saved just before a kill may never have been reported.
    pub fn started(&mut self, session: &Session) {
        let engine = session.engine();
        // A worker opens one session.
        let _ = self.shown.set(engine.runtime().view());
        let step = engine.current_step().0;
        if let Some(path) = session.last_checkpoint() {
            self.send(&FromWorker::Checkpoint { step, directory: path.display().to_string(), losses: None });
        }
        let (parameters, plan) = (engine.plan().parameters, engine.plan().headline());
        self.send(&FromWorker::Started { step, parameters, plan });
    }
}

impl Observer for Reporter {
    fn step(&mut self, report: &StepReport, progress: &Progress) {
        let step = report.stats.step.0;
        if self.losses.len() == REMEMBERED {
            self.losses.pop_front();
        }
        let valid_loss = progress.valid_loss.filter(|loss| loss.is_finite());
        self.losses.push_back((step, Losses { train_loss: Some(report.loss), valid_loss }));
        self.last_sent = step;
        self.lines.send(&FromWorker::Step(StepMetrics {
            step,
            total_steps: self.total_steps,
            train_loss: report.loss,
            valid_loss,
            learning_rate: report.learning_rate,
            gradient_norm: Some(report.stats.gradient_norm).filter(|norm| norm.is_finite()),
            tokens_per_second: Some(progress.tokens_per_second).filter(|rate| rate.is_finite()),
            trained_tokens: step * self.tokens_per_step,
            stall_ratio: report.stall_ratio(),
            device_bytes: progress.device_used.0,
            host_bytes: progress.host_used.0,
            chunk_moves: report.stats.stats.chunk_moves(),
            seconds_left: progress.time_left.map(|time| time.as_secs_f64()),
        }));
    }

    fn message(&mut self, text: &str) {
        self.lines.send(&FromWorker::Log { message: text.to_owned() });
    }

    fn before_step(&mut self, engine: &Engine) -> Result<(), Error> {
        // Budgets are known once the first step has shown what else needs memory.
        if engine.runtime().trace().is_none() {
            return Ok(());
        }
        let wanted = self.retunes.try_iter().reduce(|first, later| first.then(&later));
        for told in wanted.map(|wanted| self.tuning.apply(engine, &wanted)).transpose()?.into_iter().flatten() {
            self.message(&told);
        }
        Ok(())
    }

    /// Waits until the service has stored every step so far. Otherwise a kill of both could leave a checkpoint beyond a
    /// step that nobody has heard of, and no later run would report it.
    fn before_save(&mut self) -> Result<(), Error> {
        while self.last_stored < self.last_sent {
            let gone = |_| Error::Failed("the service is gone: a new one starts this job again".to_owned());
            self.last_stored = self.stored.recv().map_err(gone)?;
        }
        Ok(())
    }

    fn saved(&mut self, step: Step, path: &Path) {
        let losses = self.losses.iter().find(|(of, _)| *of == step.0).map(|(_, losses)| *losses);
        let directory = path.display().to_string();
        self.lines.send(&FromWorker::Checkpoint { step: step.0, directory, losses });
    }
}
