// Drives the dashboard in a real browser: it shows the tree, streams a haiku, and shows a worker that is killed and comes
// back while streams go on. `node dashboard.mjs URL [SCREENSHOT_FOLDER]`.

import assert from "node:assert/strict";
import { existsSync, mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [url, shots] = process.argv.slice(2);
const path = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const browser = await chromium.launch({ executablePath: path, args: ["--no-sandbox", "--force-prefers-reduced-motion"] });
const context = await browser.newContext({ viewport: { width: 1200, height: 1000 }, colorScheme: "light" });
const page = await context.newPage();
const complaints = [];
page.on("console", (message) => { if (message.type() === "error") complaints.push(message.text()); });
page.on("pageerror", (error) => complaints.push(String(error)));
const outside = [];
page.on("request", (request) => { if (!request.url().startsWith(url) && !request.url().startsWith("data:")) outside.push(request.url()); });

async function shoot(name) {
  if (!shots) return;
  mkdirSync(shots, { recursive: true });
  await page.screenshot({ path: `${shots}/${name}.png` });
}

await page.goto(url);
await page.waitForSelector("[data-replica] .state.ready");
await page.waitForSelector("[data-actor=router] .state.ready");
assert.match(await page.textContent("#summary"), /up .* tokens\/s/);
assert.ok((await page.locator("#models tbody tr").count()) >= 1);
assert.ok((await page.locator("[data-device] .bar rect").count()) >= 6, "memory is shown by kind");
assert.match(await page.textContent("[data-replica]"), /\d+ restarts? · pid \d+ · .*0 streams · .*KV 0\/\d+ blocks/);
console.log("ok the tree is shown");

// Every control can be reached by Tab alone.
const reached = new Set();
for (let n = 0; n < 40; n += 1) {
  await page.keyboard.press("Tab");
  reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.tagName.toLowerCase()));
}
for (const control of ["theme", "prompt", "model", "send", "clear", "summary", "log"]) assert.ok(reached.has(control), `${control} of ${[...reached]}`);

// From the keyboard alone.
await page.focus("#prompt");
await page.keyboard.type("the moon over a river");
await page.keyboard.press("Enter");
await page.waitForSelector("#talk .assistant[data-done]", { timeout: 60_000 });
const haiku = (await page.textContent("#talk .assistant")).trim();
assert.ok(haiku.split(/\s+/).length >= 6, haiku);
assert.ok((await page.locator("#talk .assistant span[title]").count()) > 3, "tokens are coloured by their probability");
assert.match(await page.textContent("#speed"), /tokens · first after/);
console.log(`ok a haiku came:\n${haiku}`);
await shoot("dashboard-light");

const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
const light = await paper();
await page.click("#theme");
assert.equal(await page.getAttribute("html", "data-theme"), "dark");
assert.notEqual(await paper(), light);

// The controls count: one token where one is asked for.
await page.click("#clear");
await page.click("summary");
await page.fill("#max_tokens", "1");
await page.fill("#prompt", "the moon");
await page.press("#prompt", "Enter");
await page.waitForSelector("#talk .assistant[data-done]");
assert.match(await page.textContent("#speed"), /^1 tokens? · /);
await page.fill("#max_tokens", "256");
await page.click("summary");
await page.click("#clear");
await page.fill("#prompt", "the moon over a river");
await page.press("#prompt", "Enter");
await page.waitForSelector("#talk .assistant[data-done]");
console.log("ok the sampling controls count");
/** What the page's own source says of the house. */
const house = async () => (await (await fetch(`${url}/api/status`)).json()).house;
const replicas = async () => (await house()).devices.flatMap((device) => device.replicas);

/**
 * A long stream of another client whose worker is stopped in the middle of it: its reader, what came so far, and the worker.
 * Nothing if the stream was over before the signal came.
 */
async function interrupted() {
  const workers = (await replicas()).map((replica) => replica.pid);
  assert.ok(workers.every(Boolean), "each worker is a process of its own");
  const long = { model: "basho", prompt: "rain", max_tokens: 200, ignore_eos: true, seed: 7, stream: true, stream_options: { include_usage: true } };
  const response = await fetch(`${url}/v1/completions`, { method: "POST", body: JSON.stringify(long) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const begun = (await reader.read()).value;
  workers.forEach((pid) => process.kill(pid, "SIGSTOP"));
  // Two pictures in a row are the same: what the workers had written by then is read.
  const running = (list) => list.map((replica) => replica.running).join();
  let [last, now] = ["", await replicas()];
  while (last !== running(now)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    [last, now] = [running(now), await replicas()];
  }
  const victim = now.find((replica) => replica.running > 0);
  workers.filter((pid) => pid !== victim?.pid).forEach((pid) => process.kill(pid, "SIGCONT"));
  return victim && { reader, begun, victim };
}

async function killed() {
  const resumed = (await house()).router.requests.resumed;
  let stream;
  for (let n = 0; !stream && n < 50; n += 1) stream = await interrupted();
  assert.ok(stream, "a stream of 200 tokens is caught in the middle");
  const { reader, victim } = stream;
  process.kill(victim.pid, "SIGKILL");
  // And somebody at the page asks for another haiku while there is no worker.
  await page.fill("#prompt", "snow on the village");
  await page.click("#send");
  let text = stream.begun;
  for (let next = await reader.read(); !next.done; next = await reader.read()) text += next.value;
  assert.match(text, /"completion_tokens":200\b/, "no token is lost");
  assert.ok(text.endsWith("data: [DONE]\n\n") && !text.includes('"error"'), text.slice(-500));
  await page.waitForSelector("#talk .assistant[data-done] >> nth=1", { timeout: 60_000 });
  const second = (await page.locator("#talk .assistant").nth(1).textContent()).trim();
  assert.ok(second.split(/\s+/).length >= 6, second);
  assert.equal(await page.locator("#talk .error").count(), 0);
  const { incarnation, replica: { model, index } } = victim;
  const place = `[data-replica="${model}/${index}"]`;
  // So many workers were started before this one: so many restarts there are now.
  const facts = page.locator(`${place} .dim`, { hasText: new RegExp(`^${incarnation} restart`) });
  await facts.waitFor({ timeout: 60_000 });
  await page.waitForSelector(`${place} .state.ready`);
  assert.match(await facts.textContent(), /last end: signalled 9/);
  assert.ok((await page.locator("#log [data-event=worker_ended]").count()) >= 1);
  await shoot("dashboard-restart");
  assert.ok((await house()).router.requests.resumed > resumed, "the stream went on with the second worker");
  console.log("ok a worker was killed and came back, and the streams were whole");
}

// Only somebody on the server's own machine can kill its worker.
if (["127.0.0.1", "localhost", "[::1]"].includes(new URL(url).hostname)) await killed();
else console.log("skipped: the worker of a server elsewhere cannot be killed from here");

await page.setViewportSize({ width: 390, height: 800 });
const overflow = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
assert.ok(!overflow, "it fits a phone");
await shoot("dashboard-phone");
assert.deepEqual(complaints, [], "the console is silent");
assert.deepEqual(outside, [], "nothing is loaded from elsewhere");
console.log("ok it fits a phone, complains of nothing and loads nothing from elsewhere");
await browser.close();
