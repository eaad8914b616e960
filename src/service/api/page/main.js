// What happens when.

function askForToken() {
  if (!$("token").open) $("token").showModal();
}

async function listJobs() {
  const list = await ask("/v1/fine_tuning/jobs?limit=50");
  showJobs(list.data);
  // Its status may have changed without an event that we have heard yet.
  const current = list.data.find((job) => job.id === shown.job?.id);
  if (current && current.status !== shown.job.status) showJob(current);
  return list.data;
}

/** Repeats for as long as the page is looked at. */
function every(milliseconds, work) {
  const once = async () => {
    if (document.hidden) return;
    // Being away or not allowed is shown elsewhere, and it is tried again.
    await work().catch(() => {});
  };
  const loop = async () => {
    await once();
    setTimeout(loop, milliseconds);
  };
  loop();
  document.addEventListener("visibilitychange", once);
}

$("new-job").addEventListener("click", openSubmit);
$("enter-token").addEventListener("click", askForToken);
$("submit-close").addEventListener("click", () => submit.close());
form.addEventListener("submit", start);
let typed = 0;
form.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(plan, 250);
});
policies.addEventListener("submit", applyPolicies);
$("show-steps").addEventListener("change", showEvents);
for (const button of document.querySelectorAll("[data-order]")) button.addEventListener("click", () => order(button));
$("token").addEventListener("close", () => {
  const { token } = $("token").querySelector("form");
  if (token.value) {
    sessionStorage.setItem("token", token.value.trim());
    token.value = "";
    begin();
  }
});
const redraw = () => {
  loss.draw();
  rate.draw();
  if (chunkMap.map) {
    drawTiers($("tiers"), chunkMap.map);
    chunkMap.draw();
  }
};
window.addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

/** The job of the address, or the newest. */
async function begin() {
  try {
    const jobs = await listJobs();
    const wanted = location.hash.slice(1);
    const first = jobs.find((job) => job.id === wanted) ?? jobs.find((job) => job.status === "running") ?? jobs[0];
    if (first) choose(first.id);
    await fillPolicies();
  } catch (error) {
    if (error.status !== 401) $("link").textContent = error.message;
  }
}

begin();
every(1500, listJobs);
every(2000, async () => { if (shown.job) await showActors(); });
setInterval(refresh, 200);
