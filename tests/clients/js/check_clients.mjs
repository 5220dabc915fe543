// OpenAI's and Anthropic's clients and Vercel's AI SDK, unmodified, against a running server.
//
//     npm ci                               # in a copy of this folder, FOLDER
//     KVARENA_URL=http://127.0.0.1:8000 KVARENA_KEY=KEY CLIENTS_JS=FOLDER node --test check_clients.mjs
//
// The server serves models/demo as `demo` with a context of 512 tokens or more.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const require = createRequire(process.env.CLIENTS_JS + "/");
const { default: OpenAI } = require("openai");
const { default: Anthropic } = require("@anthropic-ai/sdk");
const { generateObject, generateText, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { createOpenAI } = require("@ai-sdk/openai");
const { createAnthropic } = require("@ai-sdk/anthropic");
const { z } = require("zod");

const url = process.env.KVARENA_URL;
const apiKey = process.env.KVARENA_KEY;
const baseURL = `${url}/v1`;
const model = "demo";
const messages = [{ role: "user", content: "Hello!" }];
const parameters = {
  type: "object", properties: { x: { enum: [1, 2] } }, required: ["x"], additionalProperties: false,
};
const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const claude = new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });
const person = z.object({ age: z.number().int().min(0).max(99), kind: z.enum(["friend", "stranger"]) });

async function all(stream) {
  const made = [];
  for await (const part of stream) made.push(part);
  return made;
}

test("openai: a chat and its stream", async () => {
  const whole = await openai.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(whole.choices[0].finish_reason, "stop");
  const runner = openai.chat.completions.stream({ model, messages, temperature: 0 });
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
  const usage = { include_usage: true };
  const chunks = await all(
    await openai.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: usage }),
  );
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

test("openai: a response, its stream, and one that goes on", async () => {
  const whole = await openai.responses.create({ model, input: "Hello!", temperature: 0 });
  const stream = openai.responses.stream({ model, input: "Hello!", temperature: 0 });
  const kinds = (await all(stream)).map((event) => event.type);
  assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
  assert.equal((await stream.finalResponse()).output_text, whole.output_text);
  const next = { model, input: "And now?", previous_response_id: whole.id, max_output_tokens: 4 };
  assert.equal((await openai.responses.create(next)).previous_response_id, whole.id);
  assert.equal((await openai.responses.retrieve(whole.id)).output_text, whole.output_text);
});

test("openai: its own loop of tools", async () => {
  const called = [];
  const run = (args) => (called.push(JSON.parse(args).x), "7");
  const tools = [{ type: "function", function: { name: "f", parameters, function: run } }];
  const choice = { type: "function", function: { name: "f" } };
  const runner = openai.chat.completions.runTools({ model, messages, tools, tool_choice: choice, temperature: 0 });
  await runner.done();
  assert.equal(called.length, 1);
  assert.ok([1, 2].includes(called[0]));
});

test("openai: errors", async () => {
  await assert.rejects(openai.chat.completions.create({ model: "no", messages }), OpenAI.NotFoundError);
  await assert.rejects(openai.chat.completions.create({ model, messages, temperature: -1 }), OpenAI.BadRequestError);
  await assert.rejects(new OpenAI({ baseURL, apiKey: "no" }).models.list(), OpenAI.AuthenticationError);
});

test("anthropic: a message, its stream, its count, its tools", async () => {
  const request = { model, messages, max_tokens: 12, temperature: 0 };
  const whole = await claude.messages.create(request);
  const stream = claude.messages.stream(request);
  assert.equal(await stream.finalText(), whole.content[0].text);
  const { input_tokens: counted } = await claude.messages.countTokens({ model, messages });
  assert.equal(counted, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
  const tools = [{ name: "f", input_schema: parameters }];
  const called = await claude.messages.create({ ...request, max_tokens: 60, tools, tool_choice: { type: "any" } });
  assert.equal(called.stop_reason, "tool_use");
  assert.ok([1, 2].includes(called.content[0].input.x));
  await assert.rejects(claude.messages.create({ ...request, model: "no" }), Anthropic.NotFoundError);
});

const sdks = {
  "chats": createOpenAICompatible({ name: "ours", baseURL, apiKey, supportsStructuredOutputs: true })(model),
  "responses": createOpenAI({ baseURL, apiKey }).responses(model),
  "messages": createAnthropic({ baseURL, apiKey })(model),
};
for (const [name, of] of Object.entries(sdks)) {
  test(`ai: ${name}, whole, streamed, as an object, with tools`, async () => {
    const asked = { model: of, prompt: "Hello!", temperature: 0, maxRetries: 0, maxOutputTokens: 300 };
    const whole = await generateText(asked);
    assert.equal(whole.finishReason, "stop");
    assert.ok(whole.usage.inputTokens > 0 && whole.usage.outputTokens > 0);
    const streamed = streamText(asked);
    assert.equal((await all(streamed.textStream)).join(""), whole.text);
    const { object } = await generateObject({ ...asked, schema: person });
    assert.ok(object.age >= 0 && object.age <= 99);
    const called = [];
    const execute = async ({ day }) => (called.push(day), "It is done.");
    const plan = tool({ description: "Plans.", inputSchema: z.object({ day: z.enum(["mon", "tue"]) }), execute });
    const worked = await generateText({ ...asked, tools: { plan }, toolChoice: "required", stopWhen: stepCountIs(3) });
    assert.ok(worked.steps.length >= 2);
    assert.ok(called.length >= 1 && called.every((day) => ["mon", "tue"].includes(day)));
  });
}
