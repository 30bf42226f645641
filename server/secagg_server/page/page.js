// Shows /overview.json, which is all that this page asks for, every few seconds. Whatever it says
// becomes text, never markup: names of tasks are somebody's choice.

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const FEWEST_SLOTS = 30;
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

const ROUND_STATES = {
  CREATED: ["starting", "busy"],
  COLLECTING: ["collecting", "busy"],
  CHECKING: ["checking", "busy"],
  SUMMING: ["adding", "busy"],
  RELEASING: ["opening", "busy"],
  AUDITING: ["auditing the noise", "warn"],
  DONE: ["done", "good"],
  ABORTED: ["no result", "bad"],
};

const TASK_STATES = {
  RUNNING: ["running", "busy"],
  FINISHED: ["finished", "good"],
  FAILED: ["failed", "bad"],
};

const REASONS = {
  BUDGET_SPENT: "the task's privacy budget has no room for another release",
  CONTEXT_MISMATCH: "made for another round",
  CONVERGED: "its stop criteria were met",
  DUPLICATE_UPLOAD: "a second upload of one client",
  INVALID_RECEIPT: "the signature does not cover the upload",
  INVALID_SEAL: "the sealed seed cannot be opened",
  MALFORMED: "bytes of the wrong size or range",
  NORM_REFUSED: "beyond the norm or direction that the plan allows",
  NOT_ENROLLED: "nobody of that name or key is enrolled",
  OFF_GRID: "named by the noise audit",
  QUORUM_NOT_REACHED: "fewer clients than the plan's minimum",
  RELEASE_REFUSED: "the sum did not open",
  REVOKED: "of a client that has been revoked",
  ROUND_CLOSED: "the round had moved on",
  STORAGE_UNAVAILABLE: "a disk or database did not do its work",
  UNAVAILABLE: "the key holder could not be reached",
  WITHDRAWN: "taken back by the client itself",
};

// --- text ----------------------------------------------------------------------------------

const count = (value) => value.toLocaleString("en");

const plural = (value, what) => `${count(value)} ${what}${value === 1 ? "" : "s"}`;

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : Number(value.toPrecision(2))} ${units[unit]}`;
}

function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  if (value < 172800) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} days`;
}

function roughly(value) {
  if (value < 60) return `${Math.max(0, Math.floor(value))} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 172800) return `${Math.floor(value / 3600)} h`;
  return `${Math.floor(value / 86400)} days`;
}

const clock = (moment) => new Date(moment).toLocaleTimeString("en-GB");

const between = (from, to) => (Date.parse(to) - Date.parse(from)) / 1000;

// --- elements ------------------------------------------------------------------------------

function element(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function badge([text, kind]) {
  return element("span", { class: `badge ${kind}` }, text);
}

function bar(part, kind = "") {
  const inner = element("i", { class: kind });
  inner.style.width = `${100 * Math.min(1, Math.max(0, part))}%`;
  return element("div", { class: "track" }, inner);
}

function meter(part, text, kind = "") {
  return element("div", { class: "meter" }, bar(part, kind), element("span", {}, text));
}

function cell(...inside) {
  return element("td", {}, ...inside);
}

function number(text) {
  return element("td", { class: text === "–" ? "number none" : "number" }, text);
}

function refusals(refused) {
  const found = Object.entries(refused).sort((one, other) => other[1] - one[1]);
  if (!found.length) return element("td", { class: "none" }, "–");
  const parts = found.map(([code, times]) => {
    const name = element("span", { class: "code" }, code);
    if (REASONS[code]) name.title = REASONS[code];
    return element("span", {}, `${count(times)} `, name);
  });
  return element("td", { class: "refusals" }, ...parts);
}

// What has not changed stays, so that a selection in it does.
function keep(parent, items, keyOf, make) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const key = keyOf(item);
    const content = JSON.stringify(item);
    const there = old.get(key);
    if (there && there.dataset.content === content) return there;
    const made = make(item);
    made.dataset.key = key;
    made.dataset.content = content;
    return made;
  });
  wanted.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] || null);
  });
  while (parent.children.length > wanted.length) parent.lastChild.remove();
}

function say(id, text) {
  const there = byId(id);
  if (there.textContent !== text) there.textContent = text;
}

// --- charts --------------------------------------------------------------------------------

// Each bar: { parts: [[height, class], ...], title }; heights in one unit. The newest is right.
function chart(id, bars, { top, label, left, right }) {
  const [width, height, foot, head] = [340, 118, 16, 14];
  const plot = shape("svg", {});
  const highest = top || 1;
  for (const part of [0, 0.5, 1]) {
    const y = head + (height - head - foot) * (1 - part);
    plot.append(shape("line", { class: "grid", x1: 0, x2: width, y1: y, y2: y }));
  }
  const slots = Math.max(bars.length, FEWEST_SLOTS);
  const slot = width / slots;
  const thick = slot * 0.7;
  bars.forEach((each, index) => {
    const group = shape("g", {});
    let y = height - foot;
    for (const [value, kind] of each.parts) {
      const share = Math.min(value / highest, 1);
      const tall = Math.max(share * (height - head - foot), value > 0 ? 1.5 : 0);
      y -= tall;
      const x = (slots - bars.length + index) * slot + (slot - thick) / 2;
      group.append(shape("rect", { class: `bar ${kind}`, x, y, width: thick, height: tall, rx: Math.min(1.5, thick / 3) }));
    }
    group.append(shape("title", {}, each.title));
    plot.append(group);
  });
  plot.append(shape("text", { x: 0, y: 9 }, label));
  plot.append(shape("text", { x: 0, y: height - 3 }, left));
  plot.append(shape("text", { x: width, y: height - 3, "text-anchor": "end" }, right));
  const there = byId(id);
  there.setAttribute("viewBox", `0 0 ${width} ${height}`);
  there.replaceChildren(...plot.children);
}

// The next of 1, 2, 5, 10, 20, 50, ... that is not below.
function ceiling(value, least = 1) {
  let step = least;
  for (let index = 0; step < value; index += 1) step *= index % 3 === 1 ? 2.5 : 2;
  return step;
}

function showTraffic(minutes) {
  const known = minutes.filter((minute) => "uploads" in minute);
  // Most of what is refused had come in whole, in the same minute or the one before.
  const all = known.map((minute) => Math.max(minute.uploads, minute.refused));
  const top = ceiling(Math.max(0, ...all), 5);
  const ends = { left: "an hour ago", right: "now" };
  const bars = (parts, text) =>
    minutes.map((minute) => {
      const at = clock(minute.minute).slice(0, 5);
      if (!("uploads" in minute)) return { parts: [[0, ""]], title: `${at}: not known` };
      return { parts: parts(minute), title: `${at}: ${text(minute)}` };
    });
  chart(
    "uploads",
    bars(
      (minute) => [[Math.max(0, minute.uploads - minute.refused), ""], [minute.refused, "refused"]],
      (minute) => `${plural(minute.uploads, "upload")} came in whole, ${count(minute.refused)} refused`,
    ),
    { top, label: count(top), ...ends },
  );
  const most = ceiling(Math.max(0, ...known.map((minute) => minute.bytes)), 1000);
  chart(
    "bytes",
    bars((minute) => [[minute.bytes, ""]], (minute) => bytes(minute.bytes)),
    { top: most, label: bytes(most), ...ends },
  );
  const uploads = known.reduce((sum, minute) => sum + minute.uploads, 0);
  const refused = known.reduce((sum, minute) => sum + minute.refused, 0);
  const received = known.reduce((sum, minute) => sum + minute.bytes, 0);
  say("uploads-now", `${count(uploads)} in the last hour`);
  say("bytes-now", `${bytes(received)} in the last hour`);
  byId("uploads").setAttribute("aria-label", `${plural(uploads, "upload")} came in whole and ${count(refused)} were refused in the last hour`);
  byId("bytes").setAttribute("aria-label", `${bytes(received)} of ciphertext received in the last hour`);
}

function showDurations(rounds, now) {
  const shown = [...rounds].reverse();
  const took = shown.map((round) => between(round.created, round.ended || now));
  // What goes on has no length yet: it must not make the others small.
  const ended = took.filter((_, index) => shown[index].ended);
  const top = ceiling(Math.max(0, ...(ended.length ? ended : took)));
  const bars = shown.map((round, index) => {
    const [state] = ROUND_STATES[round.state] || [round.state];
    return {
      parts: [[took[index], round.ended ? round.state : "open"]],
      title: `${round.task} ${round.round}.${round.attempt}, ${state}: ${seconds(took[index])}`,
    };
  });
  chart("durations", bars, { top, label: seconds(top), left: "", right: shown.length ? "newest" : "" });
  const done = took.filter((_, index) => shown[index].state === "DONE").sort((one, other) => one - other);
  const middle = done.length ? seconds(done[Math.floor(done.length / 2)]) : "";
  say("durations-now", middle && `median ${middle}`);
  byId("durations").setAttribute("aria-label", middle ? `${plural(done.length, "round")} done; half of them took ${middle} or less` : "no round is done");
}

// --- tables --------------------------------------------------------------------------------

function showFigures(found) {
  const running = found.tasks.filter((task) => task.state === "RUNNING").length;
  const open = found.rounds.filter((round) => !round.ended);
  const last = found.traffic.slice(-6, -1).filter((minute) => "uploads" in minute);
  const rate = last.length ? last.reduce((sum, minute) => sum + minute.uploads, 0) / last.length : 0;
  const refused = Object.values(found.verdicts).reduce((sum, times) => sum + times, 0);
  const judged = found.accepted + refused;
  const counts = found.task_counts;
  const total = Object.values(counts).reduce((sum, times) => sum + times, 0);
  const figures = [
    ["Tasks running", count(counts.RUNNING ?? running), `of ${count(Math.max(total, found.tasks.length))} on record`],
    ["Rounds open", count(open.length), open.length ? open.map((round) => (ROUND_STATES[round.state] || [round.state])[0]).slice(0, 3).join(", ") : "none is going on"],
    ["Uploads a minute", rate >= 10 || rate === 0 ? count(Math.round(rate)) : rate.toFixed(1), "over the last 5 minutes"],
    ["Uploads refused", judged ? `${Number(((100 * refused) / judged).toPrecision(2))} %` : "–", judged ? `${count(refused)} of ${count(judged)} in these rounds` : "none has come"],
    ["Clients enrolled", found.enrolled === null ? "open" : count(found.enrolled), found.enrolled === null ? "whoever is on this machine" : `${count(found.clients_seen)} seen of late`],
    ["Queue", found.waiting === null ? "–" : count(found.waiting), found.calls === null ? "" : `${count(found.calls)} of ${count(found.call_limit)} calls; ${found.disk_free === null ? "disk unknown" : `${bytes(found.disk_free)} free`}`],
  ];
  keep(byId("figures"), figures, (figure) => figure[0], ([name, value, more]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", {}, more)),
  );
}

function privacy(task) {
  const budget = task.privacy;
  if (!budget) return element("td", { class: "none" }, "no budget");
  if (!("spent" in budget)) return cell(`ε ${budget.epsilon}`);
  const part = budget.spent / budget.epsilon;
  const kind = budget.releases_left === 0 ? "out" : part > 0.8 ? "low" : "";
  const text = `ε ${Number(budget.spent.toPrecision(3))} of ${budget.epsilon}`;
  const made = meter(part, text, kind);
  const left = element("span", { class: "why" }, `δ ${budget.delta}; ${plural(budget.releases_left, "release")} left`);
  return cell(made, left);
}

function showTasks(found) {
  byId("no-tasks").hidden = found.tasks.length > 0;
  const shown = found.tasks.map((task) => ({ ...task, ago: roughly(between(task.created, found.now)) }));
  keep(byId("task-rows"), shown, (task) => task.task, (task) => {
    const state = element("td", {}, badge(TASK_STATES[task.state] || [task.state, ""]));
    if (task.reason) {
      const why = element("span", { class: "why code" }, task.reason);
      if (REASONS[task.reason]) why.title = REASONS[task.reason];
      state.append(why);
    }
    const rounds = task.rounds ? cell(meter(task.rounds_done / task.rounds, `${count(task.rounds_done)} of ${count(task.rounds)}`)) : cell(count(task.rounds_done));
    const clients = task.target_clients > task.min_clients ? `${count(task.min_clients)} to ${count(task.target_clients)}` : count(task.min_clients ?? 0);
    return element(
      "tr",
      {},
      element("th", { scope: "row", class: "name", title: task.task }, task.task),
      state,
      rounds,
      privacy(task),
      number(clients),
      number(task.upload_bytes ? bytes(task.upload_bytes) : "–"),
      element("td", { class: "number", title: task.created }, `${task.ago} ago`),
    );
  });
}

function showRounds(found) {
  byId("no-rounds").hidden = found.rounds.length > 0;
  const shown = found.rounds.map((round) => ({
    ...round,
    took: between(round.created, round.ended || found.now),
    ago: roughly(between(round.created, found.now)),
    left: round.closes ? between(found.now, round.closes) : null,
  }));
  keep(byId("round-rows"), shown, (round) => JSON.stringify([round.task, round.round, round.attempt]), (round) => {
    const name = element("th", { scope: "row", class: "name", title: round.task }, `${round.task} `, element("span", { class: "quiet" }, String(round.round)));
    if (round.attempt > 1) name.append(" ", element("span", { class: "quiet" }, `attempt ${round.attempt}`));
    const state = element("td", {}, badge(ROUND_STATES[round.state] || [round.state, ""]));
    if (round.reason) {
      const why = element("span", { class: "why code" }, round.reason);
      if (REASONS[round.reason]) why.title = REASONS[round.reason];
      state.append(why);
    } else if (round.state === "COLLECTING" && round.left !== null) {
      state.append(element("span", { class: "why" }, round.left > 0 ? `closes in ${seconds(Math.round(round.left))} at most` : "closes now"));
    }
    const came = round.receiving && !round.ended ? `${count(round.accepted)}, ${count(round.receiving)} on the way` : count(round.accepted);
    const uploads = round.target_clients && !round.ended ? cell(meter(round.accepted / round.target_clients, `${came} of ${count(round.target_clients)}`)) : cell(came);
    const done = round.state === "DONE";
    return element(
      "tr",
      {},
      name,
      state,
      uploads,
      refusals(round.refused),
      number(done ? count(round.contributors) : "–"),
      number(seconds(round.took)),
      number(done ? seconds(round.add_ms / 1000) : "–"),
      number(done ? seconds(round.open_ms / 1000) : "–"),
      element("td", { class: "number", title: round.created }, `${round.ago} ago`),
    );
  });
}

function showVerdicts(found) {
  const refused = Object.entries(found.verdicts).sort((one, other) => other[1] - one[1]);
  const total = found.accepted + refused.reduce((sum, [, times]) => sum + times, 0);
  const rows = [["accepted", found.accepted, total, ""], ...refused.map(([code, times]) => [code, times, total, "out"])];
  keep(byId("verdict-rows"), rows, (row) => row[0], ([code, times, all, kind]) => {
    const name = element("span", { class: kind ? "code" : "" }, code);
    const made = element("li", {}, element("div", { class: "line" }, name, element("span", {}, count(times))), bar(all ? times / all : 0, kind));
    if (REASONS[code]) made.append(element("span", { class: "why" }, REASONS[code]));
    return made;
  });
}

function showClients(found) {
  const more = found.clients_seen > found.clients.length ? `; the first ${count(found.clients.length)} are shown` : "";
  say("clients-note", `${plural(found.clients_seen, "client")} in the newest ${plural(found.uploads_read, "upload")}, those with refusals first${more}.`);
  keep(byId("client-rows"), found.clients, (client) => client.client, (client) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", class: "code", title: client.client }, client.client.slice(0, 16)),
      element("td", { class: "name" }, `${client.task} `, element("span", { class: "quiet" }, String(client.round))),
      number(count(client.accepted)),
      refusals(client.refused),
    ),
  );
}

// --- the loop ------------------------------------------------------------------------------

let last = null; // what was shown last, and when it came
let silentSince = null;
let paused = false;

function showState(text, kind) {
  say("state", text);
  byId("state").className = `badge ${kind}`;
  document.title = `${text} · secagg server`;
}

function show(found) {
  showFigures(found);
  showTraffic(found.traffic);
  showDurations(found.rounds, found.now);
  showTasks(found);
  showRounds(found);
  showVerdicts(found);
  showClients(found);
  const expires = found.certificate_expires === null ? "" : ` Its certificate expires on ${new Date(found.certificate_expires * 1000).toLocaleDateString("en-GB", { dateStyle: "long" })}.`;
  say("about", `secagg ${found.version}, running for ${roughly(between(found.started, found.now))}.${expires}`);
  if (found.ready) showState("ready", "good");
  else showState("not ready: its log says why", "warn");
}

function showSilence(why) {
  silentSince ??= Date.now();
  const before = last ? ` What is below is from ${clock(last)}.` : "";
  byId("silence").hidden = false;
  say("silence", `The server has not answered since ${clock(silentSince)}: ${why}.${before} This page keeps asking.`);
  document.body.classList.add("old");
  showState("no answer", "bad");
}

async function ask() {
  const answer = await fetch("overview.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(`it says ${answer.status}`);
  return answer.json();
}

async function look() {
  if (!paused && !document.hidden) {
    const found = await ask().catch((error) => {
      showSilence(error.name === "TypeError" ? "it cannot be reached" : error.name === "TimeoutError" ? "it takes too long" : error.message);
    });
    if (found) {
      last = Date.now();
      silentSince = null;
      byId("silence").hidden = true;
      document.body.classList.remove("old");
      show(found);
    }
    say("looked", last ? `as of ${clock(last)}` : "");
  }
  setTimeout(look, EVERY_MS);
}

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  say("looked", last ? `${paused ? "paused at" : "as of"} ${clock(last)}` : "");
});

look();
