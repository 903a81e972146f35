// Drives a running Playhouse with the official `openai` package, streaming and not: `node openai_js.mjs URL [KEY]`.

import assert from "node:assert/strict";
import OpenAI, { NotFoundError, BadRequestError } from "openai";

const [url, key = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url.replace(/\/$/, "")}/v1`, apiKey: key, maxRetries: 0, timeout: 120_000 });
const haiku = { messages: [{ role: "user", content: "the moon" }], seed: 7, max_tokens: 40 };

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const model = (await client.models.list()).data[0].id;
assert.equal((await client.models.retrieve(model)).id, model);

const whole = await client.chat.completions.create({ model, ...haiku });
const text = whole.choices[0].message.content;
assert.ok(text.length > 0);
console.log("ok a chat has text");

const chunks = await collect(await client.chat.completions.create({ model, stream: true, stream_options: { include_usage: true }, ...haiku }));
assert.equal(chunks[0].choices[0].delta.role, "assistant");
assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), text);
assert.deepEqual(chunks.at(-1).usage, whole.usage);
console.log("ok a stream has the same text, and its usage");

const helper = client.chat.completions.stream({ model, ...haiku });
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);
console.log("ok the stream helper puts it together");

const request = { model, prompt: "the moon", max_tokens: 8, temperature: 0 };
const completion = await client.completions.create({ ...request, logprobs: 2 });
assert.equal(completion.choices[0].logprobs.tokens.length, 8);
const pieces = await collect(await client.completions.create({ ...request, stream: true }));
assert.equal(pieces.map((piece) => piece.choices[0].text).join(""), completion.choices[0].text);
console.log("ok completions, whole and streamed");

const response = await client.responses.create({ model, input: "the moon", max_output_tokens: 30, seed: 7 });
assert.ok(response.output_text.length > 0);
const events = await collect(await client.responses.create({ model, input: "the moon", max_output_tokens: 30, seed: 7, stream: true }));
const streamed = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
assert.equal(streamed, response.output_text);
console.log("ok responses, whole and streamed");

const embedded = await client.embeddings.create({ model, input: "the moon" });
assert.ok(Math.abs(embedded.data[0].embedding.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-3);
console.log("ok embeddings");

// A client that stops reading early: the house must be able to serve the next request at once.
const early = await client.chat.completions.create({ model, stream: true, ...haiku, max_tokens: 200, ignore_eos: true });
for await (const chunk of early) if (chunk.choices[0]?.delta.content) break;
assert.ok((await client.chat.completions.create({ model, ...haiku })).choices[0].message.content === text);
console.log("ok a stream that is left early");

await assert.rejects(client.chat.completions.create({ model: "nobody", ...haiku }), (error) => error instanceof NotFoundError && error.code === "model_not_found");
await assert.rejects(client.chat.completions.create({ model, ...haiku, temperature: -1 }), (error) => error instanceof BadRequestError && error.param === "temperature");
console.log("ok errors are typed");
