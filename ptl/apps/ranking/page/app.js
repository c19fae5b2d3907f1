// The page: one prompt at a time, its order, its verdict. Keys and clicks lead to the same few functions.

import { described, drawAnswers, drawBoard, drawCards, turns } from "./board.js";
import { anyOpen, askFlag, askName, showAgreement, showHelp } from "./dialogs.js";
import { draggable } from "./drag.js";
import * as order from "./order.js";
import { Refused, get, newKey, send } from "./wire.js";
import { duration, language, say, speak } from "./words.js";

const $ = (id) => document.getElementById(id);
const kept = (name) => localStorage.getItem(`ptl-rank-${name}`);
const keep = (name, value) => localStorage.setItem(`ptl-rank-${name}`, value);

const state = { name: null, fixed: false, total: 0, task: null, tiers: [], chosen: null, busy: true, ended: false };
const clock = { seen: 0, since: null };

// ---- time: only while the page can be seen ----

function restartClock() {
  clock.seen = 0;
  clock.since = document.hidden ? null : performance.now();
}

function elapsed() {
  return (clock.seen + (clock.since === null ? 0 : performance.now() - clock.since)) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && clock.since !== null) clock.seen += performance.now() - clock.since;
  clock.since = document.hidden ? null : performance.now();
});

// ---- what is said ----

const tell = (text) => ($("notice").textContent = text);

function warn(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = text === "";
}

const whisper = (text) => ($("live").textContent = text);

// ---- drawing ----

function draw() {
  const total = state.task.answers.length;
  const ranked = order.count(state.tiers);
  drawBoard(state.tiers, total, state.chosen);
  drawCards(state.tiers, state.chosen);
  $("submit-word").textContent = ranked > 0 && ranked < total ? say("submitSome", ranked, total) : say("submit");
  $("submit").setAttribute("aria-disabled", String(ranked < 2));
  $("tie").disabled = $("remove").disabled = state.chosen === null;
}

function drawProgress({ done, seconds }) {
  $("bar").max = state.total;
  $("bar").value = done;
  $("count").textContent = say("done", done, state.total);
  const left = (state.total - done) * (seconds ?? 0);
  $("pace").textContent = seconds !== null && left > 0 ? say("pace", duration(seconds), duration(left)) : "";
}

function drawTask() {
  const { task } = state;
  $("place").textContent = say("prompt", task.index + 1, state.total);
  const roles = task.prompt.length > 1 || task.prompt[0].role !== "user";
  $("prompt").replaceChildren(...turns(task.prompt, { roles }));
  drawAnswers(task.answers);
  $("back").disabled = task.index === 0;
  $("next").disabled = task.last === null || task.index + 1 >= state.total;
  const status = task.last?.status;
  if (status === "ranked") tell(say("wasRanked"));
  else if (status === "skipped") tell(say("wasSkipped"));
  else if (status === "flagged") tell(say("wasFlagged", task.last.flag));
  else tell("");
  drawProgress(task.progress);
  draw();
}

function drawAll() {
  $("who").textContent = state.name ?? "";
  $("who").disabled = state.fixed;
  $("task").hidden = state.ended || !state.task;
  $("end").hidden = !state.ended;
  if (state.task && !state.ended) drawTask();
}

// ---- drafts: an order that was not submitted survives a reload, as long as the same answers stand at its places ----

const draftName = () => `draft-${state.name}-${state.task.id}-${state.task.version}`;

function draft() {
  try {
    return JSON.parse(kept(draftName()));
  } catch {
    return null;
  }
}

// ---- moving between prompts ----

async function patiently(ask) {
  for (;;) {
    try {
      const answer = await ask();
      warn("");
      return answer;
    } catch (error) {
      warn(error instanceof Refused ? error.message : say("lost"));
      if (error instanceof Refused) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

async function open(index) {
  state.busy = true;
  state.ended = index === null;
  if (index !== null) {
    state.task = await patiently(() => get(`/api/prompts/${index}`, { annotator: state.name }));
    state.tiers = draft() ?? state.task.last?.tiers ?? [];
    state.chosen = null;
  }
  drawAll();
  restartClock();
  state.busy = false;
  (state.ended ? $("end") : $("place")).focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

async function resume() {
  const session = await patiently(() => get("/api/session", state.name ? { annotator: state.name } : {}));
  state.total = session.total;
  state.fixed = session.annotator !== null;
  state.name = session.annotator ?? state.name;
  speak(kept("lang") ?? session.lang);
  $("lang").value = language();
  if (!state.name) {
    state.name = await askName(null);
    keep("name", state.name);
    return resume();
  }
  drawProgress(session.progress);
  await open(session.progress.next);
  return undefined;
}

const back = () => open(state.ended ? state.total - 1 : Math.max(0, state.task.index - 1));
const next = () => !$("next").disabled && open(state.task.index + 1);

// ---- verdicts ----

async function verdict(action, extra = {}) {
  if (state.busy || state.ended) return;
  if (action === "rank" && order.count(state.tiers) < 2) {
    warn(say("twoNeeded"));
    return;
  }
  state.busy = true;
  const { id, index } = state.task;
  const tiers = action === "skip" ? [] : state.tiers;
  const said = { annotator: state.name, id, key: newKey(), action, tiers, seconds: elapsed(), ...extra };
  try {
    const answer = await send(said, () => warn(say("retrying")));
    localStorage.removeItem(`ptl-rank-${draftName()}`);
    whisper(say("saved"));
    drawProgress(answer.progress);
    if (answer.progress.next === null) state.task.index = index;
    await open(answer.progress.next);
  } catch (error) {
    warn(say("refused", error.message));
    state.busy = false;
  }
}

async function flag() {
  if (state.busy || state.ended) return;
  const given = await askFlag();
  if (given) await verdict("flag", given);
}

// ---- the order ----

function arrange(tiers, answer) {
  if (state.busy || state.ended) return;
  state.tiers = tiers;
  state.chosen = answer;
  keep(draftName(), JSON.stringify(tiers));
  warn("");
  draw();
  if (answer !== null) whisper(described(tiers, answer));
}

function pick(answer) {
  const known = order.tierOf(state.tiers, answer) >= 0;
  arrange(known ? state.tiers : order.append(state.tiers, answer), answer);
}

function withChosen(change) {
  if (state.chosen === null) return false;
  arrange(change(state.tiers, state.chosen), state.chosen);
  return true;
}

const tie = () => withChosen(order.toggleTie);
const remove = () => withChosen(order.remove);

function dropped(answer, target) {
  const at = Number(target.dataset.at);
  const to = {
    gap: () => order.insert(state.tiers, answer, at),
    tier: () => order.join(state.tiers, answer, at),
    tray: () => order.remove(state.tiers, answer),
    board: () => order.append(state.tiers, answer),
  };
  arrange(to[target.dataset.drop](), answer);
}

// ---- keys ----

const KEYS = {
  ArrowUp: () => withChosen((tiers, answer) => order.move(tiers, answer, -1)),
  ArrowDown: () => withChosen((tiers, answer) => order.move(tiers, answer, 1)),
  Enter: () => verdict("rank"),
  Backspace: back,
  b: back,
  n: next,
  t: tie,
  u: remove,
  Delete: remove,
  s: () => verdict("skip"),
  f: flag,
  "?": showHelp,
  Escape: () => (state.chosen === null ? false : arrange(state.tiers, null)),
};
KEYS.ArrowLeft = KEYS.ArrowUp;
KEYS.ArrowRight = KEYS.ArrowDown;

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || anyOpen() || state.busy) return;
  const within = event.target.closest("input, select, textarea, button, a, summary");
  const chip = within?.classList.contains("chip");
  if (within?.matches("input, select, textarea")) return;
  if (within && !chip && event.key === "Enter") return; // Enter presses the button that has the focus
  const single = event.key.length === 1;
  if (single && !$("shortcuts").checked) return;
  // By place, not by character: the digits of a French keyboard need Shift.
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code)?.[1];
  if (digit && !state.ended) {
    if (Number(digit) <= state.task.answers.length) pick(Number(digit) - 1);
    // Whoever ranks by keys is done with the button that had the focus: Enter is to submit.
    if (within && !chip) document.querySelector(`[data-chip="${digit - 1}"]`)?.focus({ preventScroll: true });
    event.preventDefault();
    return;
  }
  const act = KEYS[single ? event.key.toLowerCase() : event.key];
  const arrow = event.key.startsWith("Arrow");
  if (!act || (event.repeat && !arrow) || (state.ended && act !== back && act !== showHelp)) return;
  if (act() !== false) event.preventDefault();
}

// ---- wiring ----

document.addEventListener("keydown", onKey);
draggable(document.body, dropped);
document.addEventListener("click", (event) => {
  const handle = event.target.closest("[data-drag]");
  if (handle && !state.busy) pick(Number(handle.dataset.drag));
});
const buttons = { tie, remove, back, next, flag, skip: () => verdict("skip"), submit: () => verdict("rank") };
for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", () => state.busy || act());
for (const id of ["tie", "remove"]) {
  // After a click of the mouse, Enter should submit and not press this button again.
  $(id).addEventListener("click", (event) => event.detail && document.querySelector(".chip[aria-pressed=true]")?.focus());
}
$("end-back").addEventListener("click", back);
$("help").addEventListener("click", showHelp);
$("agreement").addEventListener("click", async () => showAgreement(await patiently(() => get("/api/agreement"))));
$("who").addEventListener("click", async () => {
  const name = await askName(state.name);
  if (!name || name === state.name) return;
  state.name = name;
  keep("name", name);
  await resume();
});
$("lang").addEventListener("change", () => {
  keep("lang", $("lang").value);
  speak($("lang").value);
  drawAll();
});
$("shortcuts").checked = kept("shortcuts") !== "off";
$("shortcuts").addEventListener("change", () => keep("shortcuts", $("shortcuts").checked ? "on" : "off"));

history.replaceState(null, "", "/"); // the token of the link stays out of the history; a cookie holds it by now
state.name = kept("name");
speak(kept("lang"));
await resume();
