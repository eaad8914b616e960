// The service's own: actors, and the policies that they follow.

async function showActors() {
  const list = await ask("/v1/patrickstar/actors");
  const own = list.data.filter((actor) => !actor.job || actor.job === shown.job?.id);
  $("actors").replaceChildren(...own.map((actor) => {
    const fault = actor.last_fault ? ` (${actor.last_fault})` : "";
    const row = make("tr", {}, make("th", { scope: "row" }, actor.name));
    for (const value of [actor.state + fault, actor.mailbox, actor.processed, actor.restarts]) {
      row.append(make("td", {}, typeof value === "number" ? whole.format(value) : String(value)));
    }
    return row;
  }));
}

const policies = $("policies");
/** What the fields had when they were filled: only what somebody changed is sent. */
let filled = new Map();

/** A size as one would write it, to the byte. */
function exact(value) {
  const units = [["GiB", 2 ** 30], ["GB", 1e9], ["MiB", 2 ** 20], ["MB", 1e6], ["KiB", 1024]];
  const [unit, size] = units.find(([, size]) => value && value % size === 0) ?? ["", 1];
  return `${value / size}${unit}`;
}

async function fillPolicies() {
  const { config } = await ask("/v1/patrickstar/config");
  for (const field of policies.querySelectorAll("[name]")) {
    const value = field.name.split(".").reduce((table, key) => table?.[key], config);
    field.value = typeof value === "number" && field.type !== "number" ? exact(value) : value ?? "";
    filled.set(field.name, field.value);
  }
  policies.hidden = false;
}

async function applyPolicies(event) {
  event.preventDefault();
  const set = {};
  for (const field of policies.querySelectorAll("[name]")) {
    if (field.value.trim() !== filled.get(field.name)) {
      set[field.name] = field.type === "number" ? Number(field.value) : field.value.trim();
    }
  }
  const said = $("policies-said");
  said.className = "";
  if (!Object.keys(set).length) {
    said.value = "Nothing was changed.";
    return;
  }
  try {
    const answer = await tell("/v1/patrickstar/config", { set }, "PUT");
    const parts = [];
    if (answer.applied.length) parts.push(`applied: ${answer.applied.join(", ")}`);
    if (answer.needs_restart.length) parts.push(`needs restart: ${answer.needs_restart.join(", ")}`);
    await fillPolicies();
    said.value = parts.join("; ") || "nothing changed";
  } catch (error) {
    said.className = "bad";
    said.value = error.message;
  }
}
