// What the page says to the service. Every answer is data: it reaches the page as text, never as markup.

/** The service refused, or is not there (status 0). */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const AWAY = "The service does not answer. This page tries again.";

function headers(more = {}) {
  const token = sessionStorage.getItem("token");
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", redirect: "error", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    showLink(false);
    throw new Refusal(0, AWAY);
  }
  showLink(true);
  if (response.ok) return response;
  if (response.status === 401) askForToken();
  const said = await response.json().catch(() => null);
  throw new Refusal(response.status, said?.error?.message ?? `HTTP ${response.status}`);
}

async function ask(path, signal) {
  return (await send(path, { headers: headers(), signal })).json();
}

async function tell(path, body, method = "POST") {
  const options = { method, headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body ?? {}) };
  return (await send(path, options)).json();
}

/** Lines of JSON are sent as they are, other text as documents. */
async function upload(file) {
  const form = new FormData();
  form.set("purpose", "fine-tune");
  if (file.name.endsWith(".jsonl")) {
    form.set("file", file);
  } else {
    const text = await file.text();
    const lines = [];
    // The service refuses lines that are too long. Documents follow each other without a gap, so cutting changes nothing.
    for (let at = 0; at < text.length;) {
      let end = Math.min(at + 500_000, text.length);
      // Not between the two halves of a character.
      if (end < text.length && (text.charCodeAt(end) & 0xfc00) === 0xdc00) end -= 1;
      lines.push(JSON.stringify({ text: text.slice(at, end) }) + "\n");
      at = end;
    }
    form.set("file", new Blob(lines), `${file.name}.jsonl`);
  }
  return (await send("/v1/files", { method: "POST", headers: headers(), body: form })).json();
}

const sleep = (milliseconds, signal) => new Promise((done) => {
  const timer = setTimeout(done, milliseconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); done(); }, { once: true });
});

/**
 * Tells `hear` every event of a job, from its first to its end, over as many connections as it takes: the id of the last one
 * says where to go on. `EventSource` would do the same, but cannot send a token.
 */
async function follow(job, hear, signal) {
  let last = null;
  for (let wait = 250; !signal.aborted; wait = Math.min(wait * 2, 5000)) {
    try {
      const more = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
      const response = await send(`/v1/patrickstar/jobs/${job}/stream`, { headers: headers(more), signal });
      for await (const event of events(response.body)) {
        wait = 250;
        if (event.kind === "end") return;
        hear(JSON.parse(event.data));
        last = event.id ?? last;
      }
    } catch (error) {
      if (signal.aborted) return;
      // What is refused for good is refused again.
      if (error instanceof Refusal && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    }
    await sleep(wait, signal);
  }
}

/** The events of a body; what a cut leaves unfinished is none. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: null, kind: "message", data: "" };
      for (const line of block.split("\n")) {
        const [, field, text] = /^([^:]*): ?(.*)$/.exec(line) ?? [];
        if (field === "id") event.id = text;
        else if (field === "event") event.kind = text;
        else if (field === "data") event.data += text;
      }
      if (event.data) yield event;
    }
  }
}
