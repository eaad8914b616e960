// The live page in a real browser: a job from its form to its end, told what to do, seen through kills of the service.
//
//   node tests/browser/page.mjs PROGRAM MODULES OUT
//
// PROGRAM is patrickstar, MODULES a directory in which npm has installed playwright-core, OUT where screenshots go.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

import { Service } from "./service.mjs";

const [program, modules, out] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "here.js"))("playwright-core");
/** Longest wait for anything: others may use the machine. */
const PATIENCE = 60_000;

const service = new Service(program, "token-of-the-browser-test");
await service.start();
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});

const faults = [];
async function open(options) {
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(PATIENCE);
  page.on("pageerror", (error) => faults.push(error.stack));
  page.on("dialog", (dialog) => faults.push(`a script opened a dialog: ${dialog.message()}`));
  page.on("console", (message) => {
    // A request that fails is expected of a service that is killed.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) faults.push(message.text());
  });
  page.on("request", (request) => {
    const { origin } = new URL(request.url());
    if (origin !== service.url && !request.url().startsWith("data:")) faults.push(`asked ${request.url()}`);
  });
  await page.goto(`${service.url}/`);
  await page.locator("#token input").fill(service.token);
  await page.keyboard.press("Enter");
  return page;
}

async function step(name, work) {
  await work();
  assert.deepEqual(faults, [], name);
  console.log(`ok: ${name}`);
}

const page = await open({ viewport: { width: 1360, height: 900 } });
const until = (what, ...given) => page.waitForFunction(what, given[0], { timeout: PATIENCE, polling: 100 });
const chip = (text) => until((text) => document.getElementById("job-status").textContent.includes(text), text);
const stepNow = () => page.evaluate(() => loss.x.at(-1) ?? 0);
const later = async (steps) => until((wanted) => (loss.x.at(-1) ?? 0) >= wanted, await stepNow() + steps);
let job;

await step("a job is described, judged and started", async () => {
  const name = join(service.data, "<img src=x onerror=alert(1)>.txt");
  writeFileSync(name, "down to the sea run all the rivers, and none of them has ever asked why.\n".repeat(800));
  await page.click("#new-job");
  await page.selectOption("#submit [name=model]", "gpt-tiny");
  await page.setInputFiles("#submit [name=upload]", name);
  await page.fill("#submit [name=suffix]", "rivers");
  await page.fill("#submit [name=steps]", "100000");
  await page.fill("#submit [name=settings]", ["train.recompute = \"full\"", "train.micro_batches = 2", "train.seq_len = 32",
    "model.context = 32", "memory.chunk = 32KiB", "checkpoint.every = 50"].join("\n"));
  await page.fill("#submit [name=device]", "70KB");
  await until(() => document.getElementById("verdict").value.startsWith("It does not fit"));
  await page.fill("#submit [name=device]", "2600KiB");
  await until(() => document.getElementById("verdict").value.startsWith("It fits"));
  await page.screenshot({ path: join(out, "submit.png") });
  await page.click("#submit-go");
  await chip("running");
  job = (await service.get("/v1/fine_tuning/jobs")).data[0].id;
});

await step("the loss falls", async () => {
  await later(150);
  const [first, last] = await page.evaluate(() => [loss.y[0], loss.y.at(-1)]);
  assert.ok(last < first - 0.5, `${first} to ${last}`);
  const painted = await page.evaluate(() => {
    const { width, height } = loss.canvas;
    return loss.canvas.getContext("2d").getImageData(0, 0, width, height).data.some((byte) => byte > 0);
  });
  assert.ok(painted);
});

await step("the chunk map changes", async () => {
  const places = () => page.evaluate(() => JSON.stringify(chunkMap.map?.chunks.map((chunk) => chunk.tier)));
  await until(() => chunkMap.map !== null);
  const picture = () => page.evaluate(() => document.getElementById("chunks").toDataURL());
  const [before, drawn] = [await places(), await picture()];
  await until((before) => JSON.stringify(chunkMap.map.chunks.map((chunk) => chunk.tier)) !== before, before);
  assert.notEqual(await picture(), drawn);
  assert.match(await page.getAttribute("#chunks", "aria-label"), /^Chunk map of step \d+: \d+ chunks, .*\d+ on host/);
  assert.ok(await page.locator("#tiers .tier").count() >= 2);
  assert.ok(await page.locator("#actors tr").count() >= 5);
});

await step("curves and chunks are read by keyboard", async () => {
  await page.focus("#loss");
  const newest = await page.evaluate(() => document.getElementById("loss-readout").value);
  await page.keyboard.press("ArrowLeft");
  assert.notEqual(await page.evaluate(() => document.getElementById("loss-readout").value), newest);
  await page.focus("#chunks");
  await page.keyboard.press("ArrowRight");
  assert.match(await page.evaluate(() => document.getElementById("chunk-readout").value), /^chunk 0: /);
});

await step("an eviction policy is changed while it trains", async () => {
  await page.selectOption("[name='actors.eviction.policy']", "lru");
  await page.fill("[name='actors.eviction.prefetch']", "3");
  await page.click("#policies button");
  await until(() => document.getElementById("policies-said").value !== "");
  const said = await page.evaluate(() => document.getElementById("policies-said").value);
  assert.match(said, /applied: .*actors\.eviction\.policy/);
  const { config } = await service.get("/v1/patrickstar/config");
  assert.deepEqual([config.actors.eviction.policy, config.actors.eviction.prefetch], ["lru", 3]);
  await later(50);
});

await step("screenshots are taken", async () => {
  await page.evaluate(() => window.scrollTo(0, 0));
  await page.screenshot({ path: join(out, "desktop.png"), fullPage: true });
  const dark = await open({ viewport: { width: 1360, height: 900 }, colorScheme: "dark" });
  await dark.waitForFunction(() => chunkMap.map !== null && loss.x.length > 100);
  await dark.screenshot({ path: join(out, "dark.png"), fullPage: true });
  await dark.close();
  const phone = await open({ viewport: { width: 375, height: 812 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true });
  await phone.waitForFunction(() => chunkMap.map !== null && loss.x.length > 100);
  assert.equal(await phone.evaluate(() => document.documentElement.scrollWidth), 375);
  await phone.screenshot({ path: join(out, "phone.png"), fullPage: true });
  await phone.close();
});

await step("it is paused and goes on", async () => {
  await page.click("[data-order=pause]");
  await chip("paused");
  await until(() => shown.messages.at(-1)?.message.startsWith("The worker left"));
  const paused = await stepNow();
  await page.waitForTimeout(500);
  assert.equal(await stepNow(), paused);
  assert.ok(await page.isDisabled("[data-order=pause]"));
  await page.click("[data-order=resume]");
  await chip("running");
  await later(20);
});

await step("the page lives through a kill of the service", async () => {
  await service.kill();
  await until(() => document.getElementById("link").className === "away");
  await service.start();
  await until(() => document.getElementById("link").className === "here");
  await later(60);
  const steps = await page.evaluate(() => loss.x);
  assert.deepEqual(steps, steps.map((_, index) => index + 1), "a step was lost or came twice");
});

await step("it is cancelled, once somebody is sure", async () => {
  await page.click("[data-order=cancel]");
  await page.click("#sure [value=no]");
  assert.equal((await service.get(`/v1/fine_tuning/jobs/${job}`)).status, "running");
  await page.click("[data-order=cancel]");
  await page.click("#sure [value=yes]");
  await chip("cancelled");
  assert.equal((await service.get(`/v1/fine_tuning/jobs/${job}`)).status, "cancelled");
});

await step("names are text, whatever is in them", async () => {
  await page.click("#new-job");
  await until(() => document.querySelector("#submit [name=file]").options.length > 1);
  const shown = await page.evaluate(() => document.querySelector("#submit [name=file]").options[1].text);
  assert.ok(shown.startsWith("<img src=x onerror=alert(1)>.txt"), shown);
  assert.equal(await page.locator("img").count(), 0);
});

await browser.close();
await service.kill();
process.exit(0);
