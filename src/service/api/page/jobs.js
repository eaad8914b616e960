// Jobs: the list, and what is shown of the one that is chosen.

const STATUS = {
  validating_files: "… reading data", queued: "… queued", running: "▶ running", paused: "‖ paused", succeeded: "✓ succeeded",
  failed: "✕ failed", cancelled: "⊘ cancelled",
};
const isFinal = (status) => ["succeeded", "failed", "cancelled"].includes(status);
const MAY = {
  pause: (status) => ["validating_files", "queued", "running"].includes(status),
  resume: (status) => status === "paused",
  cancel: (status) => !isFinal(status),
};
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const calendar = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
/** Events that are kept to be shown, of each sort. */
const KEPT = 200;

const loss = new Curve($("loss"), $("loss-readout"), "Loss", "device");
const rate = new Curve($("rate"), $("rate-readout"), "Tokens a second", "disk");
const chunkMap = new ChunkMap($("chunks"), $("chunk-readout"));

/** What the page shows now. */
const shown = { job: null, stop: null, last: null, validLoss: null, messages: [], steps: [], stale: false, heard: 0 };

function showLink(here) {
  const link = $("link");
  const text = here ? "live" : "no answer";
  // A status that does not change is not read out again.
  if (link.textContent !== text) {
    link.textContent = text;
    link.className = here ? "here" : "away";
  }
}

function nameOf(job) {
  return job.user_provided_suffix ? `${job.model} · ${job.user_provided_suffix}` : job.model;
}

function stepsOf(job) {
  const { step, total_steps: total } = job.patrickstar;
  return total ? `${whole.format(step)} / ${whole.format(total)}` : "";
}

/** Rows are kept, so that whoever walks through them by keyboard stays where they are. */
function showJobs(jobs) {
  const list = $("jobs");
  const rows = new Map([...list.children].map((row) => [row.dataset.id, row]));
  const wanted = jobs.map((job) => {
    const row = rows.get(job.id) ?? newRow(job.id);
    const button = row.firstChild;
    const [name, line, progress] = button.children;
    name.textContent = nameOf(job);
    line.children[0].textContent = STATUS[job.status] ?? job.status;
    line.children[1].textContent = stepsOf(job);
    progress.max = job.patrickstar.total_steps || 1;
    progress.value = job.patrickstar.step;
    button.setAttribute("aria-current", String(job.id === shown.job?.id));
    return row;
  });
  if (wanted.length !== list.children.length || wanted.some((row, index) => list.children[index] !== row)) {
    const focused = document.activeElement;
    list.replaceChildren(...wanted);
    if (list.contains(focused)) focused.focus();
  }
  $("no-jobs").hidden = jobs.length > 0;
}

function newRow(id) {
  const button = make("button", { type: "button" }, make("b"), make("span", {}, make("span"), make("span")),
    make("progress", { "aria-hidden": "true" }));
  button.addEventListener("click", () => choose(id));
  const row = make("li", {}, button);
  row.dataset.id = id;
  return row;
}

/** Shows another job from its first event on. */
function choose(id) {
  if (shown.job?.id === id) return;
  shown.stop?.abort();
  Object.assign(shown, { job: null, stop: new AbortController(), last: null, validLoss: null, messages: [], steps: [], stale: true });
  loss.clear();
  rate.clear();
  history.replaceState(null, "", `#${id}`);
  const { signal } = shown.stop;
  loadJob(id, signal).then(() => {
    chunkMap.clear();
    $("tiers").replaceChildren();
    $("actors").replaceChildren();
    $("memory-when").textContent = "";
    showActors().catch(() => {});
    watchJob(id, signal);
    watchChunks(id, signal);
  }).catch((error) => showError(error.message));
}

async function loadJob(id, signal) {
  const job = await ask(`/v1/fine_tuning/jobs/${id}`, signal);
  if (!signal.aborted) showJob(job);
}

function showError(message) {
  $("job-error").textContent = message;
  $("job-error").hidden = !message;
}

function showJob(job) {
  shown.job = job;
  $("welcome").hidden = true;
  $("detail").hidden = false;
  $("job-title").textContent = nameOf(job);
  document.title = `${nameOf(job)} — patrickstar`;
  const chip = $("job-status");
  chip.textContent = STATUS[job.status] ?? job.status;
  chip.className = `chip ${job.status}`;
  $("job-id").textContent = job.id;
  const began = calendar.format(job.created_at * 1000);
  $("job-when").textContent = job.fine_tuned_model ? `since ${began}; made ${job.fine_tuned_model}` : `since ${began}`;
  $("job-progress").max = job.patrickstar.total_steps || 1;
  $("job-progress").value = job.patrickstar.step;
  for (const button of document.querySelectorAll("[data-order]")) {
    button.disabled = !MAY[button.dataset.order](job.status);
  }
  showError(job.error?.message ?? "");
  shown.stale = true;
}

function showTiles() {
  const { job, last } = shown;
  if (!job) return;
  const tiles = [["Step", stepsOf(job) || "–"]];
  if (last) {
    tiles[0][1] = `${whole.format(last.step)} / ${whole.format(last.total_steps)}`;
    tiles.push(["Loss", last.train_loss.toFixed(4)], ["Tokens a second", number(last.tokens_per_second ?? 0)]);
    if (shown.validLoss !== null) tiles.push(["Validation loss", shown.validLoss.toFixed(4)]);
    tiles.push(["Tokens", short.format(last.trained_tokens)], ["Waiting for chunks", `${(100 * last.stall_ratio).toFixed(1)} %`]);
    tiles.push(["Learning rate", number(last.learning_rate)]);
    const left = (last.total_steps - last.step) * (last.trained_tokens / last.step) / last.tokens_per_second;
    if (job.status === "running" && Number.isFinite(left)) tiles.push(["Left", duration(left)]);
    $("job-progress").max = last.total_steps;
    $("job-progress").value = last.step;
  }
  if (job.patrickstar.restarts) tiles.push(["Restarts", job.patrickstar.restarts]);
  $("tiles").replaceChildren(...tiles.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

function hear(event) {
  shown.heard += 1;
  event.place = shown.heard;
  const isStep = event.type === "metrics";
  const kept = isStep ? shown.steps : shown.messages;
  kept.push(event);
  if (kept.length > KEPT) kept.shift();
  if (isStep) {
    shown.last = event.data;
    shown.validLoss = event.data.valid_loss ?? shown.validLoss;
    loss.add(event.data.step, event.data.train_loss);
    rate.add(event.data.step, event.data.tokens_per_second ?? NaN);
  }
  shown.stale = true;
}

function showEvents() {
  const events = $("show-steps").checked ? [...shown.messages, ...shown.steps] : shown.messages.slice();
  events.sort((a, b) => b.place - a.place);
  $("events").replaceChildren(...events.slice(0, KEPT).map((event) => {
    const time = new Date(event.created_at * 1000);
    const level = event.level === "info" ? "" : `${event.level}: `;
    return make("li", {}, make("time", { datetime: time.toISOString() }, clock.format(time)),
      make("span", { class: event.level }, level + event.message));
  }));
}

/** Many events become one picture. */
function refresh() {
  if (shown.stale && shown.job && !document.hidden) {
    shown.stale = false;
    showTiles();
    showEvents();
    loss.draw();
    rate.draw();
  }
}

async function watchJob(id, signal) {
  const heard = (event) => {
    hear(event);
    // What is not a step may have changed the job's status; what was told long ago has not.
    if (event.type !== "metrics" && Date.now() / 1000 - event.created_at < 60) {
      setTimeout(() => loadJob(id, signal).catch(() => {}), 150);
    }
  };
  try {
    await follow(id, heard, signal);
    if (!signal.aborted) await loadJob(id, signal);
  } catch (error) {
    if (!signal.aborted) showError(error.message);
  }
}

/** Chunks are asked for again and again while the job runs; what was seen last stays afterwards. */
async function watchChunks(id, signal) {
  while (!signal.aborted) {
    if (shown.job?.id === id && isFinal(shown.job.status)) return;
    if (shown.job?.status === "running" && !document.hidden) {
      try {
        const map = await ask(`/v1/patrickstar/jobs/${id}/chunks`, signal);
        if (signal.aborted) return;
        drawTiers($("tiers"), map);
        chunkMap.show(map);
        $("memory-when").textContent = `step ${whole.format(map.step)}`;
      } catch (error) {
        // Before it is set up and between two workers a job has no chunks to show.
        if (!(error instanceof Refusal)) return;
      }
    }
    await sleep(400, signal);
  }
}

async function order(button) {
  const { job } = shown;
  if (button.dataset.order === "cancel" && !(await isSure())) return;
  button.disabled = true;
  try {
    const changed = await tell(`/v1/fine_tuning/jobs/${job.id}/${button.dataset.order}`);
    if (shown.job?.id === changed.id) showJob(changed);
  } catch (error) {
    showError(error.message);
    button.disabled = false;
  }
}

function isSure() {
  const dialog = $("sure");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((answer) => dialog.addEventListener("close", () => answer(dialog.returnValue === "yes"), { once: true }));
}
