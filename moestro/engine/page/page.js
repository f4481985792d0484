"use strict";

const at = (id) => document.getElementById(id);
const messages = [];
let model = "";
let chat = true; // without a chat template texts are continued
let asking = null; // AbortController of the answer being written
let heat = {};
let cell = 0;

function show(role, text) {
  const item = document.createElement("li");
  item.className = role;
  const who = document.createElement("span");
  who.className = "who";
  who.textContent = role === "user" ? "You" : role === "error" ? "Error" : model;
  const body = document.createElement("span");
  body.textContent = text;
  item.append(who, body);
  at("log").append(item);
  item.scrollIntoView({ block: "end" });
  return body;
}

function settings() {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (at(name).value !== "") found[name] = Number(at(name).value);
  }
  return found;
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += decoder.decode(value, { stream: true });
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function refusal(response) {
  const wait = response.headers.get("retry-after");
  let text = `status ${response.status}`;
  try { text = (await response.json()).error.message; } catch { /* no body to show */ }
  return wait ? `${text}; try again in ${wait} s` : text;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  asking = new AbortController();
  busy(true);
  const began = performance.now();
  let body = null, count = 0, first = 0, answer = "";
  try {
    const what = chat ? { messages } : { prompt: text };
    const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, ...what, stream: true, ...settings() }),
      signal: asking.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    body = show("assistant", "");
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const delta = (chat ? choice?.delta?.content : choice?.text) ?? "";
      first ||= performance.now();
      count += 1;
      answer += delta;
      body.textContent = answer;
      at("log").scrollTop = at("log").scrollHeight;
      const seconds = (performance.now() - first) / 1000;
      at("status").textContent = `first word after ${((first - began) / 1000).toFixed(2)} s` +
        (count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} pieces a second` : "");
    }
  } catch (error) {
    if (error.name === "AbortError") at("status").textContent = "stopped";
    else show("error", error.message);
  }
  if (answer) messages.push({ role: "assistant", content: answer });
  else messages.pop();
  asking = null;
  busy(false);
}

function busy(on) {
  at("send").disabled = on;
  at("stop").disabled = !on;
  at("log").setAttribute("aria-busy", String(on));
  if (!on) at("text").focus({ preventScroll: true });
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) { bytes /= 1024; power += 1; }
  return `${bytes.toFixed(power ? 1 : 0)} ${units[power]}`;
}

function gauge(name, value, share) {
  const row = document.createElement("div");
  const key = document.createElement("dt");
  const said = document.createElement("dd");
  key.textContent = name;
  said.textContent = value;
  row.append(key, said);
  if (share !== undefined) {
    const bar = document.createElement("div");
    const part = document.createElement("span");
    bar.className = "bar";
    part.style.width = `${(100 * Math.min(1, share)).toFixed(1)}%`;
    bar.append(part);
    row.append(bar);
  }
  return row;
}

function gauges(state) {
  const g = state.gauges, c = state.counters;
  const rows = [
    gauge("Tokens a second", g.generated_tokens_per_second.toFixed(1)),
    gauge("Running, waiting", `${g.requests_running}, ${g.requests_waiting}`),
    gauge("Keys and values", `${size(g.pages_used * g.page_bytes)} of ${size(g.pages_total * g.page_bytes)}`,
      g.pages_used / g.pages_total),
    gauge("Prompt tokens not computed again", String(state.cached_tokens)),
  ];
  const asked = (c.hits ?? 0) + (c.misses ?? 0);
  if (asked) rows.push(gauge("Experts found in memory", `${(100 * c.hits / asked).toFixed(1)} %`, c.hits / asked));
  if (g.expert_budget_bytes) {
    rows.push(
      gauge("Experts in memory", `${size(g.expert_bytes)} of ${size(g.expert_budget_bytes)}`,
        g.expert_bytes / g.expert_budget_bytes),
      gauge("Read from disk", size(c.bytes)),
      gauge("Time waited for disk", `${c.waited_s.toFixed(1)} s`),
    );
  }
  at("gauges").replaceChildren(...rows);
}

function colour(share) { // dark blue, green, yellow; readable without telling red from green
  const t = Math.sqrt(Math.min(1, share));
  return `hsl(${250 - 195 * t} ${55 + 30 * t}% ${14 + 51 * t}%)`;
}

function drawHeat() {
  const layers = Object.keys(heat).map(Number).sort((a, b) => a - b);
  at("heat").hidden = layers.length === 0;
  at("heat-note").textContent = layers.length
    ? "Rows are layers, columns experts; bright: chosen often in the last seconds. Arrow keys read a cell."
    : "This model has no experts.";
  if (!layers.length) return;
  const experts = Math.max(...layers.map((layer) => heat[layer].length));
  const canvas = at("heat");
  const width = Math.max(2, Math.floor(640 / experts));
  const height = Math.max(4, Math.min(20, Math.floor(320 / layers.length)));
  canvas.width = width * experts;
  canvas.height = height * layers.length;
  const pen = canvas.getContext("2d");
  layers.forEach((layer, row) => {
    const most = Math.max(...heat[layer], 1e-9);
    heat[layer].forEach((share, expert) => {
      pen.fillStyle = colour(share / most);
      pen.fillRect(expert * width, row * height, width - (width > 3), height - 1);
    });
  });
  cell = Math.min(cell, layers.length * experts - 1);
  if (document.activeElement === canvas) {
    const row = Math.floor(cell / experts), expert = cell % experts;
    pen.strokeStyle = "#fff";
    pen.lineWidth = 2;
    pen.strokeRect(expert * width + 1, row * height + 1, width - 2, height - 2);
    at("heat-cell").textContent = `layer ${layers[row]}, expert ${expert}: ` +
      `${(100 * (heat[layers[row]][expert] ?? 0)).toFixed(1)} % of its layer's choices`;
  } else {
    at("heat-cell").textContent = "";
  }
}

async function refresh() {
  try {
    const response = await fetch("/state");
    if (!response.ok) throw new Error(await refusal(response));
    const state = await response.json();
    model = state.model;
    chat = state.chat;
    heat = state.heat;
    at("model").textContent = `${state.model}, ${state.context} positions` + (chat ? "" : ", no chat template: texts are continued");
    gauges(state);
    drawHeat();
  } catch (error) {
    at("model").textContent = `no connection (${error.message})`;
  }
  setTimeout(refresh, document.hidden ? 5000 : 1000);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || asking) return;
  at("text").value = "";
  ask(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") asking?.abort(); });
at("clear").addEventListener("click", () => {
  asking?.abort();
  messages.length = 0;
  at("log").replaceChildren();
  at("status").textContent = "";
  at("text").focus();
});
at("heat").addEventListener("keydown", (event) => {
  const layers = Object.values(heat);
  const experts = Math.max(1, ...layers.map((counts) => counts.length));
  const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -experts, ArrowDown: experts }[event.key];
  if (move === undefined) return;
  event.preventDefault();
  const next = cell + move;
  if (next >= 0 && next < layers.length * experts) cell = next;
  drawHeat();
});
at("heat").addEventListener("focus", drawHeat);
at("heat").addEventListener("blur", drawHeat);
refresh();
