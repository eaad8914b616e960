//! Server-sent events, as the service writes them.

use std::io::{self, BufRead};

/// An event of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    /// Where to go on after it.
    pub id: Option<String>,
    /// What kind it is.
    pub kind: String,
    /// What it says.
    pub data: String,
}

/// Reads a stream event by event. What a cut leaves unfinished is no event.
pub(super) struct Events<R>(pub R);

impl<R: BufRead> Iterator for Events<R> {
    type Item = io::Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut event = Event::default();
        let mut line = String::new();
        loop {
            line.clear();
            match self.0.read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
            let text = line.strip_suffix('\n')?;
            let text = text.strip_suffix('\r').unwrap_or(text);
            if text.is_empty() {
                if event.data.is_empty() {
                    event = Event::default();
                    continue;
                }
                return Some(Ok(event));
            }
            let (field, value) = text.split_once(':').unwrap_or((text, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => event.id = Some(value.to_owned()),
                "event" => value.clone_into(&mut event.kind),
                "data" => {
                    if !event.data.is_empty() {
                        event.data.push('\n');
                    }
                    event.data.push_str(value);
                }
                // A line that begins with a colon only shows that the stream lives.
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_a_torn_one_is_not() {
        let text =
            ": waiting\n\nid: 7\nevent: metrics\ndata: {\"a\":\ndata: 1}\n\nevent: end\r\ndata:x\r\n\r\nid: 8\ndata: {";
        let events: Vec<Event> = Events(text.as_bytes()).map(Result::unwrap).collect();
        let event = |id: Option<&str>, kind: &str, data: &str| Event {
            id: id.map(str::to_owned),
            kind: kind.to_owned(),
            data: data.to_owned(),
        };
        assert_eq!(events, [event(Some("7"), "metrics", "{\"a\":\n1}"), event(None, "end", "x")]);
    }
}
