// The dashboard: a picture of the house every second, news as it comes, and a chat. No library, no outside address.

const $ = (id) => document.getElementById(id);

// ---- small things ----

/** An element with a class, text and children. Text is never read as HTML. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

const seconds = (duration) => duration === null || duration === undefined ? null : duration.secs + duration.nanos / 1e9;

// ---- talking to the house ----

const key = { value: sessionStorage.getItem("key") };

function headers(extra = {}) {
  return key.value ? { ...extra, authorization: `Bearer ${key.value}` } : extra;
}

/** Asks for a key, once for however many want one. */
let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    dialog.addEventListener("close", () => {
      key.value = $("key").value;
      sessionStorage.setItem("key", key.value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function ask(path, options = {}) {
  for (;;) {
    const response = await fetch(path, { ...options, headers: headers(options.headers) });
    if (response.status !== 401) return response;
    await askForKey();
  }
}

/** Yields {event, data} of a stream of server-sent events. fetch, because EventSource cannot show a key. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const block = held.slice(0, end);
      held = held.slice(end + 2);
      let event = "message";
      let data = "";
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data) yield { event, data };
    }
  }
}

async function follow() {
  for (let wait = 500; ; wait = Math.min(wait * 2, 10000)) {
    try {
      const response = await ask("api/events");
      if (!response.ok) throw new Error(`status ${response.status}`);
      for await (const { event, data } of events(response)) {
        wait = 500;
        const value = JSON.parse(data);
        if (event === "status") showPicture(value);
        else if (event === "log") showLog(value);
        else if (event === "event") addEvent(value);
      }
    } catch (error) {
      $("summary").textContent = `no answer from the house (${error.message}); trying again`;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

// ---- the tree ----

const KINDS = ["weights", "kv", "scratch", "context", "foreign", "unaccounted"];

/** How full something is: a part of the bar for each [class, amount]. */
function barView(parts, total, label, kind) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 1000 10");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  let at = 0;
  for (const [part, amount] of parts) {
    const width = (amount / total) * 1000;
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: at, y: 0, width, height: 10, class: part })) rect.setAttribute(name, value);
    svg.append(rect);
    at += width;
  }
  return el("div", { class: kind, title: label }, svg);
}

function memoryBar(memory) {
  const used = KINDS.reduce((sum, kind) => sum + memory[kind], 0);
  const total = memory.total ?? used;
  if (!total) return null;
  const label = KINDS.map((kind) => `${kind} ${bytes(memory[kind])}`).join(", ");
  const sum = memory.total ? `${bytes(used)} of ${bytes(memory.total)}` : bytes(used);
  const bar = barView(KINDS.map((kind) => [kind, memory[kind]]), total, label, "bar");
  return el("div", {}, bar, el("div", { class: "dim", text: sum }));
}

function endText(end) {
  if (!end) return null;
  if (typeof end === "string") return end.replaceAll("_", " ");
  const [[kind, detail]] = Object.entries(end);
  const shown = typeof detail === "object" ? JSON.stringify(detail) : detail;
  return `${kind.replaceAll("_", " ")} ${shown}`;
}

const many = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

/** Tokens a second of each replica, from one picture to the next. */
const speeds = new Map();
function speedOf(replica) {
  const name = `${replica.replica.model}/${replica.replica.index}/${replica.incarnation}`;
  const now = { at: performance.now(), tokens: replica.stats.decode_tokens };
  const before = speeds.get(name);
  if (!before) {
    speeds.set(name, { ...now, rate: 0 });
    return 0;
  }
  if (now.at - before.at < 500) return before.rate;
  const rate = (1000 * (now.tokens - before.tokens)) / (now.at - before.at);
  speeds.set(name, { ...now, rate });
  return rate;
}

function replicaView(replica) {
  const facts = [];
  facts.push(many(Math.max(replica.incarnation - 1, 0), "restart"));
  if (replica.pid) facts.push(`pid ${replica.pid}`);
  const last = endText(replica.last_end);
  if (last) facts.push(`last end: ${last}`);
  facts.push(many(replica.running, "stream"));
  const stats = replica.stats;
  let kv = null;
  if (stats) {
    if (stats.waiting) facts.push(`${stats.waiting} waiting, ${stats.queued_tokens} tokens of them`);
    facts.push(`${speedOf(replica).toFixed(0)} tokens/s`, many(stats.decode_tokens, "token"));
    if (stats.preemptions) facts.push(many(stats.preemptions, "preemption"));
  }
  if (stats?.kv_blocks_total) {
    const used = stats.kv_blocks_used - stats.kv_blocks_cached;
    const label = `KV ${used}/${stats.kv_blocks_total} blocks, ${stats.kv_blocks_cached} cached`;
    facts.push(label);
    kv = barView([["kv", used], ["cached", stats.kv_blocks_cached]], stats.kv_blocks_total, label, "bar thin");
  }
  if (replica.phase === "loading" && replica.progress?.bytes_total) {
    facts.push(`${Math.round((100 * replica.progress.bytes_done) / replica.progress.bytes_total)} % loaded`);
  }
  const name = `${replica.replica.model}/${replica.replica.index}`;
  return el("li", { class: "replica", "data-replica": name },
    el("span", { class: `state ${replica.phase}`, text: replica.phase }),
    el("div", {}, el("strong", { text: name }), el("div", { class: "dim", text: facts.join(" · ") }), kv));
}

/** The actor beside the devices: who has which request. */
function routerView(router) {
  const state = !router ? "down" : router.draining ? "stopping" : "ready";
  const { accepted, refused, completed, failed, cancelled, resumed, poisoned } = router?.requests ?? {};
  const facts = router
    ? [`${accepted} accepted`, `${refused} refused`, `${completed} done`, `${failed} failed`, `${cancelled} cancelled`,
      `${resumed} resumed`, `${poisoned} poisoned`, router.draining ? "draining" : null]
    : ["restarting; what is in flight goes on"];
  return el("article", { class: "device" }, el("ul", {}, el("li", { class: "replica", "data-actor": "router" },
    el("span", { class: `state ${state}`, text: state }),
    el("div", {}, el("strong", { text: "router" }), el("div", { class: "dim", text: facts.filter(Boolean).join(" · ") })))));
}

function deviceView(device, card, memory) {
  const facts = [];
  if (card?.utilization_percent != null) facts.push(`${card.utilization_percent} % busy`);
  if (card?.temperature_c != null) facts.push(`${card.temperature_c} °C`);
  if (card?.power_mw != null) facts.push(`${Math.round(card.power_mw / 1000)} W`);
  if (card?.throttle_reasons?.length) facts.push(`throttled: ${card.throttle_reasons.join(", ")}`);
  if (card?.ecc?.uncorrected) facts.push(many(card.ecc.uncorrected, "memory error"));
  if (device.failures) facts.push(many(device.failures, "failure"));
  const rungs = Object.entries(device.oom ?? {}).filter(([, times]) => times > 0);
  if (rungs.length) facts.push(`out of memory: ${rungs.map(([rung, times]) => `${rung.replaceAll("_", " ")} ${times}`).join(", ")}`);
  if (device.quarantined) facts.push(`quarantined: ${device.quarantined}`);
  return el("article", { class: "device", "data-device": device.device },
    el("h3", { text: card?.name || (device.device === "cpu" ? "CPU" : "GPU") }),
    el("div", { class: device.quarantined ? "failed" : "dim", text: [device.device, ...facts].join(" · ") }),
    memory ? memoryBar(memory) : null,
    el("ul", { "aria-label": "Replicas" }, ...device.replicas.map(replicaView)));
}

function showPicture(picture) {
  const house = picture.house;
  if (!house) {
    $("summary").textContent = "the house has stopped";
    return;
  }
  const cards = new Map(picture.devices.map((card) => [card.uuid, card]));
  const memory = new Map(picture.memory.map((entry) => [entry.device, entry]));
  const views = house.devices.map((device) => deviceView(device, cards.get(device.device), memory.get(device.device)));
  for (const card of picture.devices) {
    if (!house.devices.some((device) => device.device === card.uuid)) {
      const idle = { device: card.uuid, replicas: [], failures: 0 };
      const free = { weights: 0, kv: 0, scratch: 0, context: 0, foreign: card.used_bytes, unaccounted: 0, total: card.total_bytes };
      views.push(deviceView(idle, card, free));
    }
  }
  $("tree").replaceChildren(routerView(house.router), ...views);
  const services = new Map((house.router?.services ?? []).map((service) => [service.model, service]));
  let open = 0;
  let speed = 0;
  const rows = picture.models.map((model) => {
    const service = services.get(model.name);
    open += service?.open_requests ?? 0;
    // A speed that was measured before says nothing about now.
    const rate = service?.open_requests ? service.tokens_per_second ?? 0 : 0;
    speed += rate;
    return el("tr", {},
      el("th", { scope: "row", text: model.name }),
      el("td", {}, el("span", { class: `state ${model.state}`, text: model.reason ? `${model.state}: ${model.reason}` : model.state })),
      el("td", { text: service ? `${service.ready}/${service.replicas}` : "0" }),
      el("td", { text: service?.open_requests ?? 0 }),
      el("td", { text: service?.waiting ?? 0 }),
      el("td", { text: service?.open_tokens ?? 0 }),
      el("td", { text: rate.toFixed(0) }));
  });
  document.querySelector("#models tbody").replaceChildren(...rows);
  pickModels(picture.models);
  const requests = house.router?.requests;
  $("summary").textContent = [
    `up ${duration(seconds(house.uptime))}`,
    `${open} open`,
    `${speed.toFixed(0)} tokens/s`,
    requests ? `${requests.completed} done, ${requests.failed} failed, ${requests.resumed} resumed` : "router restarting",
    house.router?.draining ? "draining" : null,
    `v${picture.build.version}`,
  ].filter(Boolean).join(" · ");
}

function duration(total) {
  const [h, m, s] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, Math.floor(total) % 60];
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// ---- events ----

const LOG_MAX = 300;

function eventText(entry) {
  const { number, unix_ms, event, ...rest } = entry;
  const shown = Object.entries(rest).map(([name, value]) => {
    if (name === "replica") return `${value.model}/${value.index}`;
    if (name === "end") return endText(value);
    if (value && typeof value === "object" && "secs" in value) return `${name} ${seconds(value).toFixed(2)} s`;
    return `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`;
  });
  return `${event.replaceAll("_", " ")}  ${shown.join(" · ")}`;
}

function eventView(entry) {
  const time = new Date(entry.unix_ms);
  return el("li", { "data-event": entry.event },
    el("time", { datetime: time.toISOString(), text: time.toLocaleTimeString() }), eventText(entry));
}

function addEvent(entry) {
  $("log").prepend(eventView(entry));
  while ($("log").children.length > LOG_MAX) $("log").lastChild.remove();
}

function showLog(entries) {
  $("log").replaceChildren(...entries.slice(-LOG_MAX).reverse().map(eventView));
}

// ---- chat ----

const talk = { messages: [], running: null };

function pickModels(models) {
  const select = $("model");
  const names = models.map((model) => model.name).join("\n");
  if (select.dataset.names === names) return;
  const chosen = select.value;
  select.dataset.names = names;
  select.replaceChildren(...models.map((model) => el("option", { value: model.name, text: model.name })));
  if (models.some((model) => model.name === chosen)) select.value = chosen;
  select.dataset.chat = JSON.stringify(Object.fromEntries(models.map((model) => [model.name, model.chat])));
}

const number = (id) => $(id).value === "" ? undefined : Number($(id).value);

function chatBody() {
  return {
    model: $("model").value,
    messages: talk.messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    min_p: number("min_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    logprobs: $("logprobs").checked,
    top_logprobs: $("logprobs").checked ? 3 : undefined,
  };
}

/** One token, darker the less likely it was; what else was likely is its title. */
function tokenView(text, entry) {
  if (!entry) return document.createTextNode(text);
  const p = Math.exp(entry.logprob);
  const shade = p > 0.6 ? "p0" : p > 0.3 ? "p1" : p > 0.1 ? "p2" : "p3";
  const others = entry.top_logprobs.map((top) => `${JSON.stringify(top.token)} ${(100 * Math.exp(top.logprob)).toFixed(1)} %`);
  return el("span", { class: shade, title: [`${(100 * p).toFixed(1)} %`, ...others].join("\n"), text });
}

async function send(text) {
  talk.messages.push({ role: "user", content: text });
  $("talk").append(el("li", { class: "user", text }));
  const answer = el("li", { class: "assistant" });
  $("talk").append(answer);
  const controller = new AbortController();
  talk.running = controller;
  setRunning(true);
  const start = performance.now();
  let [content, first, n] = ["", null, 0];
  try {
    const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(chatBody()), signal: controller.signal };
    const response = await ask("v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) n = chunk.usage.completion_tokens;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const { content: piece, reasoning_content: thought } = choice.delta;
      if (thought) {
        let block = answer.querySelector(".reasoning");
        if (!block) answer.prepend(block = el("span", { class: "reasoning" }));
        block.append(thought);
      }
      if (piece) {
        first ??= performance.now();
        content += piece;
        answer.append(tokenView(piece, choice.logprobs?.content?.[0]));
        $("talk").scrollTop = $("talk").scrollHeight;
      }
    }
    const took = (performance.now() - (first ?? start)) / 1000;
    const speed = n > 1 && took > 0 ? ` · ${((n - 1) / took).toFixed(0)} tokens/s` : "";
    $("speed").textContent = `${n} tokens · first after ${((first ?? performance.now()) - start).toFixed(0)} ms${speed}`;
  } catch (error) {
    if (error.name === "AbortError") $("speed").textContent = "stopped";
    else answer.append(el("span", { class: "error", text: `${content ? "\n" : ""}${error.message}` }));
  } finally {
    talk.messages.push({ role: "assistant", content });
    answer.dataset.done = "true";
    talk.running = null;
    setRunning(false);
  }
}

function setRunning(running) {
  $("send").disabled = running;
  $("stop").disabled = !running;
}

$("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || talk.running) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat").requestSubmit();
  }
});
$("stop").addEventListener("click", () => talk.running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") talk.running?.abort();
});
$("clear").addEventListener("click", () => {
  talk.running?.abort();
  talk.messages = [];
  $("talk").replaceChildren();
  $("prompt").focus();
});

// ---- light and dark ----

const root = document.documentElement;
if (localStorage.getItem("theme")) root.dataset.theme = localStorage.getItem("theme");
$("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});

follow();
