// Drives the dashboard in a real browser: it shows the tree, streams a haiku, and shows a worker that is killed and comes
// back while a stream goes on. `node dashboard.mjs URL [SCREENSHOT_FOLDER]`; KILL=1 kills the worker's process.

import assert from "node:assert/strict";
import { existsSync, mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [url, shots] = process.argv.slice(2);
const path = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const browser = await chromium.launch({ executablePath: path, args: ["--no-sandbox", "--force-prefers-reduced-motion"] });
const context = await browser.newContext({ viewport: { width: 1200, height: 820 }, colorScheme: "light" });
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
await page.waitForSelector(".device .replica .state.ready");
assert.match(await page.textContent("#summary"), /up .* tokens\/s/);
assert.ok((await page.locator("#models tbody tr").count()) >= 1);
console.log("ok the tree is shown");

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

await page.click("#theme");
assert.equal(await page.getAttribute("html", "data-theme"), "dark");
await shoot("dashboard-dark");

if (process.env.KILL) {
  const status = await (await fetch(`${url}/api/status`)).json();
  const pid = status.house.devices.flatMap((device) => device.replicas).map((replica) => replica.pid).find(Boolean);
  assert.ok(pid, "the worker is a process");
  // A long stream of another client, and the worker killed in the middle of it.
  const long = { model: "basho", prompt: "rain", max_tokens: 200, ignore_eos: true, seed: 7, stream: true, stream_options: { include_usage: true } };
  const response = await fetch(`${url}/v1/completions`, { method: "POST", body: JSON.stringify(long) });
  let [text, killed] = ["", false];
  for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
    text += piece;
    if (!killed) process.kill(pid, "SIGKILL");
    killed = true;
  }
  assert.match(text, /"completion_tokens":200\b/, "no token is lost");
  assert.ok(text.endsWith("data: [DONE]\n\n") && !text.includes('"error"'), text.slice(-500));
  await page.waitForFunction(() => /1 restart\b/.test(document.querySelector("#tree").textContent), null, { timeout: 60_000 });
  await page.waitForSelector(".replica .state.ready");
  assert.ok((await page.locator("#log [data-event=worker_ended]").count()) >= 1);
  await shoot("dashboard-restart");
  const counts = (await (await fetch(`${url}/api/status`)).json()).house.router.requests;
  assert.equal(counts.resumed, 1, "the stream went on with the second worker");
  console.log("ok a worker was killed and came back, and the stream was whole");
}

await page.setViewportSize({ width: 390, height: 800 });
const overflow = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
assert.ok(!overflow, "it fits a phone");
await shoot("dashboard-phone");
assert.deepEqual(complaints, [], "the console is silent");
assert.deepEqual(outside, [], "nothing is loaded from elsewhere");
console.log("ok it fits a phone, complains of nothing and loads nothing from elsewhere");
await browser.close();
