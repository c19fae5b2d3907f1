// The board: the order so far as numbered chips, and the gaps between them. It draws an order; it does not decide one.

import { rankOf, tierOf } from "./order.js";
import { ordinal, say } from "./words.js";

/** An element with properties; `data` and `aria` become attributes. Text is always set as text. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(data)) element.dataset[name] = value;
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

/** What is said of an answer: "Answer 3: 2nd, ties with answer 1". */
export function described(tiers, answer) {
  const at = tierOf(tiers, answer);
  const name = say("answer", answer + 1);
  if (at < 0) return `${name}: ${say("unranked")}`;
  const others = tiers[at].filter((other) => other !== answer).map((other) => other + 1);
  const place = `${name}: ${ordinal(rankOf(tiers, at))}`;
  return others.length ? `${place}, ${say("tiesWith", others.join(", "))}` : place;
}

function chip(tiers, answer, chosen) {
  return make("button", {
    type: "button",
    className: "chip",
    textContent: String(answer + 1),
    data: { drag: answer, chip: answer },
    aria: { pressed: String(answer === chosen), label: described(tiers, answer) },
  });
}

const gap = (at) => make("li", { className: "gap", data: { drop: "gap", at }, aria: { hidden: "true" } });

/** Draws the order of `total` answers. Focus stays on the chip it was on. */
export function drawBoard(tiers, total, chosen) {
  const focused = document.activeElement?.dataset?.chip;
  const list = document.getElementById("tiers");
  const rows = tiers.map((tier, at) =>
    make(
      "li",
      { className: "tier", data: { drop: "tier", at }, aria: { label: ordinal(rankOf(tiers, at)) } },
      make("span", { className: "place", textContent: ordinal(rankOf(tiers, at)), aria: { hidden: "true" } }),
      make("span", { className: "chips" }, ...tier.map((answer) => chip(tiers, answer, chosen))),
      make("span", { className: "equal", textContent: tier.length > 1 ? say("tie") : "" }),
    ),
  );
  list.replaceChildren(gap(0), ...rows.flatMap((row, at) => [row, gap(at + 1)]));
  list.classList.toggle("empty", tiers.length === 0);
  list.dataset.hint = say("dropHere");
  const left = Array.from({ length: total }, (_, answer) => answer).filter((answer) => tierOf(tiers, answer) < 0);
  const tray = document.getElementById("tray");
  tray.replaceChildren(...left.map((answer) => chip(tiers, answer, chosen)));
  tray.dataset.hint = left.length ? "" : say("allRanked");
  if (focused !== undefined) document.querySelector(`[data-chip="${focused}"]`)?.focus();
}

/** Marks the cards with their rank and the one that is chosen. */
export function drawCards(tiers, chosen) {
  for (const card of document.querySelectorAll(".answer")) {
    const answer = Number(card.dataset.answer);
    const at = tierOf(tiers, answer);
    card.classList.toggle("chosen", answer === chosen);
    card.classList.toggle("ranked", at >= 0);
    card.querySelector(".rank").textContent = at < 0 ? "" : ordinal(rankOf(tiers, at));
  }
}

/** Turns of a dialogue. Their HTML was made by the server, which escapes everything a model wrote. */
export function turns(messages, { roles }) {
  return messages.map((message) => {
    const box = make("div", { className: `turn ${message.role}`, dir: "auto" });
    if (roles) box.append(make("div", { className: "role", textContent: say(`role_${message.role}`) }));
    if (message.reasoning) {
      const thought = make("div", { className: "text" });
      thought.innerHTML = message.reasoning;
      box.append(make("details", {}, make("summary", { textContent: say("reasoning") }), thought));
    }
    const text = make("div", { className: "text" });
    text.innerHTML = message.html;
    box.append(text);
    return box;
  });
}

/** The cards of the answers, in the order in which they are shown. */
export function drawAnswers(answers) {
  document.getElementById("answers").replaceChildren(
    ...answers.map((messages, answer) =>
      make(
        "article",
        { className: "answer card", data: { answer }, aria: { labelledby: `name-${answer}` } },
        make(
          "header",
          { className: "handle", data: { drag: answer }, title: say("dragOrClick") },
          make("span", { className: "number", textContent: String(answer + 1), aria: { hidden: "true" } }),
          make("h3", { id: `name-${answer}`, textContent: say("answer", answer + 1) }),
          make("span", { className: "rank" }),
          make("span", { className: "grip", textContent: "⠿", aria: { hidden: "true" } }),
        ),
        ...turns(messages, { roles: messages.length > 1 }),
      ),
    ),
  );
}
