// The dialogs: who ranks, why a prompt is flagged, help, agreement. Each resolves to what was entered, or to null.

import { make } from "./board.js";
import { decimal, duration, say } from "./words.js";

const FLAGS = ["unclear", "unsafe", "broken", "private", "other"];
const KEYS = ["number", "arrows", "t", "u", "Enter", "s", "f", "b", "n", "Escape"];
const SHOWN = { number: ["1", "…", "9"], arrows: ["↑", "↓"], Enter: ["↵"], b: ["b", "⌫"], Escape: ["Esc"] };

const field = (id) => document.getElementById(id);

/** Shows a dialog; resolves when it is closed, to read() if its form was submitted. */
function shown(dialog, read) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? read() : null), { once: true });
  });
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault(); // nothing is ever submitted by a form: the page's policy forbids it
    dialog.close("ok");
  });
  for (const button of dialog.querySelectorAll("[data-cancel]")) button.addEventListener("click", () => dialog.close());
}

export const anyOpen = () => document.querySelector("dialog[open]") !== null;

export async function askName(current) {
  const dialog = field("name-dialog");
  field("name").value = current ?? "";
  field("name-cancel").hidden = !current;
  const stay = (event) => !current && event.preventDefault(); // without a name there is nothing to go back to
  dialog.addEventListener("cancel", stay);
  const given = shown(dialog, () => field("name").value.trim());
  field("name").select();
  const name = await given;
  dialog.removeEventListener("cancel", stay);
  return name || (current ? null : askName(current));
}

export function askFlag() {
  field("reasons").replaceChildren(
    ...FLAGS.map((reason, at) =>
      make(
        "label",
        {},
        make("input", { type: "radio", name: "reason", value: reason, checked: at === 0 }),
        make("span", { textContent: say(`flag_${reason}`) }),
      ),
    ),
  );
  field("note").value = "";
  const read = () => ({
    flag: document.querySelector("[name=reason]:checked").value,
    note: field("note").value.trim(),
  });
  return shown(field("flag-dialog"), read);
}

export function showHelp() {
  field("keys").replaceChildren(
    ...KEYS.flatMap((key) => [
      make("dt", {}, ...(SHOWN[key] ?? [key]).map((name) => make(name === "…" ? "span" : "kbd", { textContent: name }))),
      make("dd", { textContent: say(`key_${key}`) }),
    ]),
  );
  return shown(field("help-dialog"), () => null);
}

export function showAgreement(report) {
  const cell = (text, tag = "td") => make(tag, { textContent: text });
  const tau = (value) => (value === null ? "–" : decimal(value));
  field("tau").textContent = tau(report.tau);
  const over = report.tau === null ? say("noAgreement") : say("agreementOver", report.pairs, report.prompts);
  field("tau-over").textContent = over;
  const columns = ["who", "ranked", "skipped", "flagged", "median", "withOthers"];
  field("people").replaceChildren(
    make("thead", {}, make("tr", {}, ...columns.map((key) => cell(say(key), "th")))),
    make(
      "tbody",
      {},
      ...report.annotators.map((one) =>
        make(
          "tr",
          {},
          cell(one.name, "th"),
          ...[one.ranked, one.skipped, one.flagged, duration(one.seconds), tau(one.tau)].map((value) => cell(value)),
        ),
      ),
    ),
  );
  return shown(field("agreement-dialog"), () => null);
}
