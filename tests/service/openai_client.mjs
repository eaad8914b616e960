// Drives a running service with the real `openai` client of Node: node openai_client.mjs DIRECTORY http://127.0.0.1:PORT
//
// DIRECTORY holds node_modules. Prints one line a check and exits with 0 only if all held.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const [directory, address] = process.argv.slice(2);
const require = createRequire(join(directory, "package.json"));
const { OpenAI, toFile, NotFoundError, BadRequestError, VERSION } = require("openai");

const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "sk-local", maxRetries: 0 });
const jobs = client.fineTuning.jobs;

async function until(id, ...statuses) {
  for (let tries = 0; tries < 600; tries += 1) {
    const shown = await jobs.retrieve(id);
    if (statuses.includes(shown.status)) return shown;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${id} is not one of ${statuses}`);
}

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

async function refused(kind, call) {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof kind, `${error}`);
    return error;
  }
  throw new Error(`not refused: ${call}`);
}

const line = { messages: [{ role: "user", content: "ping" }, { role: "assistant", content: "pong, said the wall" }] };
const content = `${JSON.stringify(line)}\n`.repeat(60);
const file = await client.files.create({ file: await toFile(Buffer.from(content), "talk.jsonl"), purpose: "fine-tune" });
assert.equal(await (await client.files.content(file.id)).text(), content);
assert.ok((await all(client.files.list({ purpose: "fine-tune" }))).some((one) => one.id === file.id));
console.log("files");

assert.ok((await all(client.models.list())).some((model) => model.id === "gpt-tiny"));
const job = await jobs.create({
  model: "gpt-tiny",
  training_file: file.id,
  seed: 1,
  suffix: "wall",
  metadata: { team: "node" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2 } } },
  patrickstar: { "checkpoint.every": 5 },
});
const done = await until(job.id, "succeeded", "failed");
assert.equal(done.status, "succeeded", JSON.stringify(done.error));
assert.equal((await client.models.retrieve(done.fine_tuned_model)).id, done.fine_tuned_model);
console.log("job", done.fine_tuned_model);

const events = await all(jobs.listEvents(job.id, { limit: 3 }));
assert.ok(events.length > 10 && new Set(events.map((event) => event.id)).size === events.length);
const losses = events.filter((event) => event.type === "metrics").map((event) => event.data.train_loss).reverse();
assert.ok(losses.at(-1) < losses[0], `${losses}`);
const checkpoints = await all(jobs.checkpoints.list(job.id, { limit: 1 }));
assert.equal(checkpoints[0].metrics.train_loss, losses.at(-1));
console.log("events, checkpoints");

const more = [];
for (let index = 0; index < 5; index += 1) {
  more.push(await jobs.create({ model: "gpt-tiny", training_file: file.id, patrickstar: { "train.steps": 2 } }));
}
const listed = (await all(jobs.list({ limit: 2 }))).map((one) => one.id);
assert.deepEqual(listed.slice(0, 6), [...more.map((one) => one.id).reverse(), job.id]);
assert.deepEqual((await all(jobs.list({ metadata: { team: "node" } }))).map((one) => one.id), [job.id]);
console.log("lists");

const long = await jobs.create({
  model: "gpt-tiny",
  training_file: file.id,
  patrickstar: { "train.steps": 1000000, priority: 1 },
});
await until(long.id, "running");
assert.equal((await jobs.pause(long.id)).status, "paused");
assert.equal((await jobs.resume(long.id)).status, "queued");
assert.equal((await jobs.cancel(long.id)).status, "cancelled");
assert.equal((await refused(BadRequestError, () => jobs.cancel(long.id))).code, "invalid_job_state");
assert.equal((await refused(NotFoundError, () => jobs.retrieve("ftjob-none"))).code, "not_found");
console.log("pause, resume, cancel, errors");

const wish = { model: done.fine_tuned_model, prompt: "ping", max_tokens: 12, seed: 7 };
const whole = await client.completions.create(wish);
assert.equal(whole.usage.completion_tokens, 12);
let streamed = "";
for await (const piece of await client.completions.create({ ...wish, stream: true })) streamed += piece.choices[0].text;
assert.equal(streamed, whole.choices[0].text);
const asked = { model: checkpoints.at(-1).id, messages: line.messages.slice(0, 1), max_tokens: 12, seed: 7 };
const answer = await client.chat.completions.create(asked);
assert.equal(answer.choices[0].message.role, "assistant");
let said = "";
for await (const piece of await client.chat.completions.create({ ...asked, stream: true })) {
  said += piece.choices[0].delta.content ?? "";
}
assert.equal(said, answer.choices[0].message.content);
await refused(BadRequestError, () => client.completions.create({ ...wish, logprobs: 3 }));
for (const one of more) await until(one.id, "succeeded");
assert.ok((await client.files.delete(file.id)).deleted);
console.log("completions; openai", VERSION ?? "of node");
