// A new job: what it would need is said while it is being described.

const submit = $("submit");
const form = submit.querySelector("form");
let planning = null;

async function openSubmit() {
  $("submit-error").hidden = true;
  submit.showModal();
  try {
    const [models, files] = await Promise.all([ask("/v1/models"), ask("/v1/files?purpose=fine-tune&limit=100")]);
    const chosen = form.model.value;
    // Trained models are named by the job that made them; jobs begin with the others.
    const bases = models.data.filter((model) => !model.id.startsWith("ft:"));
    form.model.replaceChildren(...bases.map((model) => make("option", { value: model.id }, model.id)));
    if (chosen) form.model.value = chosen;
    const options = files.data.map((file) => make("option", { value: file.id }, `${file.filename}, ${bytes(file.bytes)}`));
    form.file.replaceChildren(make("option", { value: "" }, "none"), ...options);
    plan();
  } catch (error) {
    failSubmit(error.message);
  }
}

function failSubmit(message) {
  $("submit-error").textContent = message;
  $("submit-error").hidden = false;
}

/** A number, true or false, text in quotes, or else the text as it stands. */
function read(value) {
  try {
    return JSON.parse(value);
  } catch {
    return value;
  }
}

/** `key = value` lines, as in a configuration file. */
function settings() {
  const own = {};
  for (const line of form.settings.value.split("\n")) {
    const text = line.replace(/#.*/, "").trim();
    if (!text) continue;
    const [, key, value] = /^([A-Za-z0-9_.]+)\s*=\s*(.+)$/.exec(text) ?? [];
    if (!key) throw new Error(`“${text}” is not key = value.`);
    own[key] = read(value);
  }
  if (form.device.value.trim()) own["memory.device"] = form.device.value.trim();
  if (form.steps.value) own["train.steps"] = Number(form.steps.value);
  return own;
}

async function plan() {
  planning?.abort();
  planning = new AbortController();
  const { signal } = planning;
  const verdict = $("verdict");
  try {
    const body = { model: form.model.value, patrickstar: settings() };
    const options = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal };
    const found = await (await send("/v1/patrickstar/plan", options)).json();
    if (signal.aborted) return;
    verdict.className = `verdict ${found.fits ? "fits" : "no"}`;
    const tiers = found.tiers.filter((tier) => tier.capacity).map((tier) =>
      `${tier.tier} ${bytes(tier.chunk_peak + tier.non_model)} of ${bytes(tier.capacity)}`);
    const size = `${short.format(found.parameters)} parameters, ${bytes(found.model_states)} of model states in ${whole.format(found.chunks)} chunks`;
    verdict.value = found.fits ? `It fits: ${size}; at most ${tiers.join(", ")}.` : `It does not fit: ${size}.\n${found.problems.join("\n")}`;
  } catch (error) {
    if (signal.aborted) return;
    verdict.className = "verdict no";
    verdict.value = error.message;
  }
}

async function start(event) {
  event.preventDefault();
  const go = $("submit-go");
  go.disabled = true;
  $("submit-error").hidden = true;
  try {
    const [file] = form.upload.files;
    if (!file && !form.file.value) throw new Error("Choose a text to train on.");
    const own = { ...settings(), priority: Number(form.priority.value || 0) };
    const id = file ? (await upload(file)).id : form.file.value;
    const body = { model: form.model.value, training_file: id, patrickstar: own };
    if (form.suffix.value) body.suffix = form.suffix.value;
    if (form.epochs.value) body.method = { type: "supervised", supervised: { hyperparameters: { n_epochs: Number(form.epochs.value) } } };
    const job = await tell("/v1/fine_tuning/jobs", body);
    submit.close();
    form.upload.value = "";
    await listJobs();
    choose(job.id);
    $("job").focus();
  } catch (error) {
    failSubmit(error.message);
  } finally {
    go.disabled = false;
  }
}
