"use strict";

const at = (id) => document.getElementById(id);
const talk = [];
let state = null;
let running = null;

function say(role, text) {
  const item = document.createElement("li");
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const words = document.createElement("span");
  words.textContent = text;
  item.className = role;
  item.append(who, words);
  at("talk").append(item);
  item.scrollIntoView({ block: "nearest" });
  return words;
}

function complain(words, text) {
  words.textContent += (words.textContent ? "\n" : "") + text;
  words.classList.add("error");
}

function busy(on) {
  at("send").disabled = on;
  at("stop").disabled = !on;
}

/* Server-sent events of a response, one data line an event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

async function ask(text) {
  talk.push({ role: "user", content: text });
  say("user", text);
  const words = say("assistant", "");
  const chat = state === null || state.chat;
  const body = {
    model: state ? state.model : "", stream: true,
    max_tokens: Number(at("tokens").value) || 200,
    temperature: Number(at("temperature").value) || 0,
  };
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  if (chat) body.messages = talk;
  else body.prompt = text;
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) {
      const told = await response.json().catch(() => null);
      talk.pop();
      complain(words, told && told.error ? told.error.message : `the server answers ${response.status}`);
      return;
    }
    for await (const line of events(response)) {
      if (line === "[DONE]") break;
      const news = JSON.parse(line);
      if (news.error) { complain(words, news.error.message); break; }
      const choice = news.choices && news.choices[0];
      if (choice) words.textContent += (choice.delta ? choice.delta.content : choice.text) || "";
      words.parentElement.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name === "AbortError") complain(words, "stopped");
    else complain(words, "the server does not answer");
  } finally {
    const text = words.textContent;
    if (talk.length && talk[talk.length - 1].role === "user" && text) talk.push({ role: "assistant", content: text });
    running = null;
    busy(false);
    at("prompt").focus();
  }
}

const size = (bytes) => (bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(0)} MiB`);

function gauges() {
  const { gauges: now, counters, context, forward, cached_tokens: cached } = state;
  const rows = [
    ["tokens a second", now.generated_tokens_per_second.toFixed(1)],
    ["running, waiting", `${now.requests_running}, ${now.requests_waiting}`],
    ["keys and values", `${size(now.pages_used * now.page_bytes)} of ${size(now.pages_total * now.page_bytes)}`],
    ["prompt tokens reused", cached],
    ["positions of a text", context],
    ["forward", forward],
  ];
  if (now.expert_budget_bytes) {
    const needs = counters.hits + counters.misses;
    rows.push(
      ["experts in memory", `${size(now.expert_bytes)} of ${size(now.expert_budget_bytes)}`],
      ["found in memory", needs ? `${(100 * counters.hits / needs).toFixed(1)} %` : "none needed yet"],
      ["read from disk", size(counters.bytes)],
      ["time waited for disk", `${counters.waited_s.toFixed(1)} s`],
    );
  } else rows.push(["experts", "all in memory"]);
  at("gauges").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const figure = document.createElement("dd");
    term.textContent = name;
    figure.textContent = value;
    return [term, figure];
  }));
}

function heat() {
  const layers = Object.entries(state.heat).map(([layer, shares]) => [Number(layer), shares]);
  const any = layers.some(([, shares]) => shares.some((share) => share > 0));
  const canvas = at("heat");
  canvas.hidden = !any;
  at("none").hidden = any;
  at("none").textContent = layers.length ? "nothing yet" : "this model has no experts";
  if (!any) return;
  const width = Math.max(...layers.map(([, shares]) => shares.length));
  canvas.width = width;
  canvas.height = layers.length;
  canvas.style.height = `${Math.min(12 * layers.length, 480)}px`;
  const paint = canvas.getContext("2d");
  layers.forEach(([, shares], row) => {
    const top = Math.max(...shares, 1e-9);
    shares.forEach((share, expert) => {
      const much = Math.sqrt(share / top);
      paint.fillStyle = `rgb(${Math.round(20 + 235 * much)} ${Math.round(30 + 160 * much)} ${Math.round(60 + 20 * much)})`;
      paint.fillRect(expert, row, 1, 1);
    });
  });
  canvas.onpointermove = (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(layers.length - 1, Math.floor((event.clientY - box.top) / box.height * layers.length));
    const expert = Math.floor((event.clientX - box.left) / box.width * width);
    const [layer, shares] = layers[row];
    if (expert < shares.length) at("cell").textContent = `layer ${layer}, expert ${expert}: ${(100 * shares[expert]).toFixed(1)} %`;
  };
}

async function look() {
  let wait = 1000;
  try {
    const response = await fetch("/state");
    if (!response.ok) throw new Error(String(response.status));
    state = await response.json();
    at("model").textContent = state.model;
    at("status").textContent = state.chat ? "ready" : "ready; this model has no chat template, texts are continued";
    at("status").classList.remove("bad");
    gauges();
    heat();
  } catch {
    at("status").textContent = "the server does not answer";
    at("status").classList.add("bad");
    wait = 3000;
  }
  setTimeout(look, document.hidden ? 5000 : wait);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || running) return;
  at("prompt").value = "";
  ask(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running && running.abort());
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  talk.length = 0;
  at("talk").replaceChildren();
  at("prompt").focus();
});
look();
