//! The process that writes texts: `patrickstar sample`, started by the service and by nobody else.
//!
//! It holds one model and continues what the service sends ([`protocol`]), one wish at a time. Its standard input is a
//! socket to the service, at whose end it ends. A model that does not fit, or a crash, costs this process and no other.

pub mod protocol;
mod text;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use self::protocol::{FromSampler, Reason, ToSampler, Wish};
use self::text::Pieces;
use super::child::{self, ChildError};
use crate::checkpoint;
use crate::error::Error;
use crate::train::sample::{Sampler, Sampling};

/// Training comes first: texts take the time that it leaves.
const NICE: i32 = 10;

/// Loads the model that the service names and continues texts until the service is gone.
pub fn run() -> Result<(), ChildError> {
    let socket = child::service_socket()?;
    let mut lines = BufReader::new(socket.try_clone().map_err(ChildError::NoService)?).lines();
    let first = lines.next().ok_or_else(|| ChildError::NoWork("it has gone".into()))?;
    let first = first.map_err(ChildError::NoService)?;
    let (directory, device) = match serde_json::from_str(&first) {
        Ok(ToSampler::Load { checkpoint, device }) => (checkpoint, device),
        Ok(other) => return Err(ChildError::NoWork(format!("but {other:?}"))),
        Err(error) => return Err(ChildError::NoWork(error.to_string())),
    };
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::warn!("texts take as much time as training: {error}");
    }
    let (wish, wishes) = flume::unbounded();
    std::thread::spawn(move || listen(lines, &wish));
    let mut out = Lines(socket);
    let load = || -> Result<Sampler, Error> {
        let checkpoint = checkpoint::open(&directory)?;
        Sampler::load(&checkpoint, |config| config.compute.device = device)
    };
    let mut sampler = match load() {
        Ok(sampler) => sampler,
        Err(error) => {
            out.send(&FromSampler::Failed { message: error.to_string(), gone: !directory.is_dir() });
            return Ok(());
        }
    };
    out.send(&FromSampler::Ready);
    for wish in wishes {
        out.send(&FromSampler::Ready);
        let last = grant(&mut sampler, &wish, &mut out)
            .unwrap_or_else(|error| FromSampler::Failed { message: error.to_string(), gone: false });
        out.send(&last);
    }
    Ok(())
}

/// Passes wishes on, and ends the process when the service is gone or has lost interest: a wish may take long.
fn listen(lines: impl Iterator<Item = std::io::Result<String>>, wish: &flume::Sender<Wish>) {
    for line in lines.map_while(Result::ok) {
        match serde_json::from_str(&line) {
            // The other end outlives this thread.
            Ok(ToSampler::Continue(wanted)) => drop(wish.send(wanted)),
            Ok(ToSampler::Load { .. }) => tracing::warn!("a sampler holds one model: another one is ignored"),
            Err(error) => tracing::warn!("the service sent a line that this program does not know: {error}"),
        }
    }
    std::process::exit(0)
}

fn grant(sampler: &mut Sampler, wish: &Wish, out: &mut Lines) -> Result<FromSampler, Error> {
    let (mut prompt_tokens, mut completion_tokens) = (0, 0);
    let mut index = 0;
    for prompt in &wish.prompts {
        for of_prompt in 0..wish.n {
            let sampling = Sampling {
                temperature: wish.temperature,
                top_k: None,
                top_p: wish.top_p,
                seed: wish.seed,
                stream: of_prompt,
            };
            let mut generator = sampler.begin(prompt, sampling)?;
            if of_prompt == 0 {
                prompt_tokens += generator.prompt_tokens() as u64;
            }
            let mut pieces = Pieces::new(&wish.stop);
            let mut reason = Reason::Length;
            while generator.added() < wish.max_tokens as usize {
                generator.step()?;
                let (text, ends) = pieces.grow(&generator.text());
                out.piece(index, text);
                if ends {
                    reason = Reason::Stop;
                    break;
                }
            }
            if reason == Reason::Length {
                out.piece(index, pieces.finish(&generator.text()));
            }
            completion_tokens += generator.added() as u64;
            out.send(&FromSampler::Whole { index, reason });
            index += 1;
        }
    }
    Ok(FromSampler::Done { prompt_tokens, completion_tokens })
}

/// The way back to the service.
struct Lines(UnixStream);

impl Lines {
    fn piece(&mut self, index: u32, text: String) {
        if !text.is_empty() {
            self.send(&FromSampler::Text { index, text });
        }
    }

    /// A service that is gone is noticed by [`listen`].
    fn send(&mut self, message: &FromSampler) {
        match serde_json::to_string(message) {
            Ok(line) => drop(self.0.write_all(format!("{line}\n").as_bytes())),
            Err(error) => tracing::error!("a text cannot be written as JSON: {error}"),
        }
    }
}
