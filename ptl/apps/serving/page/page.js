// The dialogue is kept here alone; nothing is written as HTML, so what a model or a tool says cannot become page.
const at = (id) => document.getElementById(id);
let messages = [];
let running = null;

function put(kind, text = "") {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  at("dialogue").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function showTokens(tokens) {
  const box = put("tokens");
  for (const [id, text, mark, own] of tokens) {
    const span = document.createElement("span");
    span.textContent = text === "" ? "∅" : text.replaceAll("\n", "⏎\n");
    span.title = `id ${id}${own ? ", written by the model" : ""}`;
    span.className = `${mark ? "mark" : ""} ${own ? "own" : ""}`.trim();
    box.append(span);
  }
  return box;
}

function showTool(tool) {
  const box = put("tool");
  const call = document.createElement("div");
  call.className = "call";
  call.textContent = `${tool.call} (${tool.seconds.toFixed(1)} s)`;
  const result = document.createElement("div");
  result.textContent = tool.result;
  if (tool.problem) result.className = "problem";
  box.append(call, result);
}

function body() {
  const system = at("system").value.trim();
  const turns = system ? [{ role: "system", content: system }, ...messages] : messages;
  const asked = { messages: turns };
  if (at("temperature").value !== "") asked.temperature = Number(at("temperature").value);
  if (at("most").value !== "") asked.max_tokens = Number(at("most").value);
  return JSON.stringify(asked);
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    rest += value;
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

// The turns of an answer go back into the dialogue as the server's own loop has them.
async function answer() {
  let turn = put("turn assistant");
  let said = "";
  const settle = () => {
    if (said) messages.push({ role: "assistant", content: said });
    else turn.remove();
    said = "";
  };
  const response = await fetch("/api/chat", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: body(),
    signal: running.signal,
  });
  if (!response.ok) {
    turn.remove();
    const told = await response.json().catch(() => ({ error: response.statusText }));
    throw new Error(told.error?.message ?? told.error);
  }
  for await (const event of lines(response)) {
    if (event.piece !== undefined) {
      if (!turn.isConnected) turn = put("turn assistant");
      said += event.piece;
      turn.textContent = said;
      turn.scrollIntoView({ block: "end" });
    } else if (event.tool) {
      settle();
      messages.push({ role: "tool", content: event.tool.result });
      showTool(event.tool);
      turn = document.createElement("div");
    } else if (event.stopped) {
      put("note", event.stopped);
    } else if (event.error) {
      turn.remove();
      throw new Error(event.error);
    } else if (event.done) {
      settle();
      const end = event.finish === "length" ? ", cut at its limit" : "";
      put("note", `${event.done.prompt_tokens} tokens read, ${event.done.completion_tokens} written${end}`);
      showTokens(event.tokens);
    }
  }
}

async function send() {
  const text = at("say").value.trim();
  if (!text || running) return;
  const before = messages.length;
  at("say").value = "";
  messages.push({ role: "user", content: text });
  put("turn user", text);
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    await answer();
  } catch (problem) {
    if (problem.name === "AbortError") put("note", "stopped");
    else put("error", problem.message);
    messages.length = before;
  } finally {
    running = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    at("say").focus();
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("again").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("dialogue").replaceChildren();
  at("say").focus();
});
at("marks").addEventListener("change", (event) => document.body.classList.toggle("marks", event.target.checked));

const about = await (await fetch("/api/about")).json();
document.title = `${about.model} - ptl serve`;
at("model").textContent = about.model;
at("tools").textContent = about.tools.length ? `Tools: ${about.tools.map((tool) => tool.name).join(", ")}` : "";
at("temperature").placeholder = about.sampling.temperature;
at("most").placeholder = about.sampling.max_new_tokens;
