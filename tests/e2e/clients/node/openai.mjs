// npm's `openai` against the server: chat, completions and responses, tools, structured answers, errors.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { BadRequestError, NotFoundError } from "openai";
import { asked, assertArguments, assertSameText, baseURL, left, model } from "./common.mjs";

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: asked.question }];
const greedy = { model, messages, max_tokens: asked.max_tokens, temperature: 0 };
const tool = { type: "function", function: asked.tool };
const named = { type: "function", function: { name: asked.tool.name } };
const calling = { model, messages: [{ role: "user", content: asked.request }], tools: [tool], temperature: 0 };

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

test("lists the models and reads one", async () => {
  const ids = (await collect(client.models.list())).map((entry) => entry.id);
  assert.ok(ids.includes(model) && ids.length >= 5, ids.join(" "));
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("streams the chat answer that it gets in one piece", async () => {
  const whole = await client.chat.completions.create(greedy);
  const chunks = await collect(
    await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }),
  );
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assertSameText(chunks.map((chunk) => chunk.choices[0]?.delta.content).filter(Boolean), whole.choices[0].message.content);
  const reasons = chunks.map((chunk) => chunk.choices[0]?.finish_reason).filter(Boolean);
  assert.deepEqual(reasons, [whole.choices[0].finish_reason]);
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
});

test("follows a chat with its stream helper", async () => {
  const parts = [];
  const runner = client.chat.completions.stream(greedy).on("content", (part) => parts.push(part));
  const completion = await runner.finalChatCompletion();
  assertSameText(parts, completion.choices[0].message.content);
});

test("streams the completion that it gets in one piece", async () => {
  const body = { model, prompt: "The restaurant on the corner", max_tokens: asked.max_tokens, temperature: 0 };
  const whole = await client.completions.create(body);
  const chunks = await collect(await client.completions.create({ ...body, stream: true }));
  assertSameText(chunks.map((chunk) => chunk.choices[0].text).filter(Boolean), whole.choices[0].text);
});

test("two choices with log-probabilities", async () => {
  const body = { ...greedy, temperature: 1, n: 2, seed: 7, logprobs: true, top_logprobs: 3 };
  const { choices } = await client.chat.completions.create(body);
  assert.deepEqual(choices.map((choice) => choice.index), [0, 1]);
  for (const choice of choices) {
    const tokens = choice.logprobs.content;
    assert.equal(tokens.map((entry) => entry.token).join(""), choice.message.content);
    assert.ok(tokens.every((entry) => entry.logprob <= 0 && entry.top_logprobs.length === 3));
    assert.ok(tokens.every((entry) => Buffer.from(entry.bytes).toString() === entry.token));
  }
});

test("calls a required tool", async () => {
  const completion = await client.chat.completions.create({ ...calling, tool_choice: "required" });
  const [choice] = completion.choices;
  assert.equal(choice.finish_reason, "tool_calls");
  assert.equal(choice.message.content, null);
  assert.equal(choice.message.tool_calls.length, 1);
  assert.ok(choice.message.tool_calls[0].id);
  assert.equal(choice.message.tool_calls[0].type, "function");
  assert.equal(choice.message.tool_calls[0].function.name, asked.tool.name);
  assertArguments(JSON.parse(choice.message.tool_calls[0].function.arguments));
});

test("streams the tool call that it gets in one piece", async () => {
  const body = { ...calling, tool_choice: "required" };
  const whole = (await client.chat.completions.create(body)).choices[0].message.tool_calls[0].function;
  const chunks = await collect(await client.chat.completions.create({ ...body, stream: true }));
  const deltas = chunks.flatMap((chunk) => chunk.choices[0]?.delta.tool_calls ?? []);
  assert.equal(deltas[0].function.name, whole.name);
  assert.ok(deltas[0].id);
  assert.ok(deltas.length > 2, `only ${deltas.length} parts`);
  assert.ok(deltas.slice(1).every((delta) => delta.index === 0 && !delta.id && !delta.function.name));
  assert.equal(deltas.map((delta) => delta.function.arguments ?? "").join(""), whole.arguments);
  assert.equal(chunks.findLast((chunk) => chunk.choices.length).choices[0].finish_reason, "tool_calls");
});

test("assembles a named tool's call, and goes on with its result", async () => {
  const completion = await client.chat.completions.stream({ ...calling, tool_choice: named }).finalChatCompletion();
  const { message, finish_reason } = completion.choices[0];
  assert.equal(finish_reason, "stop"); // as OpenAI does where the function is named
  const [call] = message.tool_calls;
  assert.equal(call.function.name, asked.tool.name);
  assertArguments(JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content: asked.result };
  const turns = [...calling.messages, message, result];
  const answer = await client.chat.completions.create({ ...greedy, messages: turns, tools: [tool], tool_choice: "none" });
  assert.ok(answer.choices[0].message.content);
  assert.equal(answer.choices[0].message.tool_calls, undefined);
});

test("runs tools by itself", async () => {
  const booked = [];
  const book = (given) => (booked.push(given), asked.result);
  const runnable = { ...tool.function, parse: JSON.parse, function: book };
  const tools = [{ type: "function", function: runnable }];
  const runner = client.chat.completions.runTools({ ...calling, tools, tool_choice: named });
  await runner.done();
  assert.equal(booked.length, 1);
  assertArguments(booked[0]);
});

test("an answer in JSON of a schema", async () => {
  const json_schema = { name: "booking", schema: asked.tool.parameters, strict: true };
  const body = { ...greedy, max_tokens: 64, response_format: { type: "json_schema", json_schema } };
  const completion = await client.chat.completions.parse(body);
  assertArguments(completion.choices[0].message.parsed ?? JSON.parse(completion.choices[0].message.content));
});

test("streams a response", async () => {
  const body = { model, input: asked.question, max_output_tokens: asked.max_tokens, temperature: 0 };
  const whole = await client.responses.create(body);
  const parts = [];
  const stream = client.responses.stream(body).on("response.output_text.delta", (event) => parts.push(event.delta));
  const streamed = await stream.finalResponse();
  assertSameText(parts, whole.output_text);
  assert.equal(streamed.output_text, whole.output_text);
  assert.equal(streamed.status, whole.status);
  assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);
});

test("a response to a conversation", async () => {
  const body = { model, max_output_tokens: asked.max_tokens, temperature: 0 };
  const first = await client.responses.create({ ...body, input: asked.question });
  const input = [{ role: "user", content: asked.question }, ...first.output, { role: "user", content: asked.request }];
  const second = await client.responses.create({ ...body, input });
  assert.ok(second.output_text);
  assert.ok(second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens);
});

test("a response in JSON of a schema", async () => {
  const format = { type: "json_schema", name: "booking", schema: asked.tool.parameters, strict: true };
  const body = { model, input: asked.request, max_output_tokens: 64, temperature: 0, text: { format } };
  assertArguments((await client.responses.parse(body)).output_parsed);
});

test("a response with tools is refused by name", async () => {
  const tools = [{ type: "function", ...asked.tool, strict: true }];
  const refused = client.responses.create({ model, input: asked.request, tools });
  await assert.rejects(refused, (error) => error instanceof BadRequestError && error.param === "tools");
});

test("embeddings", async () => {
  const input = [asked.question, asked.request];
  const { data, usage } = await client.embeddings.create({ model, input });
  assert.deepEqual(data.map((entry) => entry.index), [0, 1]);
  assert.ok(data.every((entry) => entry.embedding.length === 640 && entry.embedding.every(Number.isFinite)));
  assert.notDeepEqual(data[0].embedding, data[1].embedding);
  assert.ok(usage.prompt_tokens > 10);
  const exact = await client.embeddings.create({ model, input, encoding_format: "float" });
  data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - exact.data[0].embedding[i]) < 1e-5));
});

test("errors are the client's own", async () => {
  const unknown = client.chat.completions.create({ ...greedy, model: asked.unknown });
  await assert.rejects(unknown, (error) => error instanceof NotFoundError && error.code === "model_not_found");
  const streamed = client.chat.completions.create({ ...greedy, model: asked.unknown, stream: true });
  await assert.rejects(streamed, (error) => error instanceof NotFoundError && error.code === "model_not_found");
  const invalid = client.chat.completions.create({ ...greedy, temperature: -1 });
  await assert.rejects(invalid, (error) => error instanceof BadRequestError && error.param === "temperature");
});

test("a stream that is left ends on the server too", async () => {
  const before = await left();
  const stream = await client.chat.completions.create({ ...greedy, max_tokens: 2000, stream: true });
  for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
  const deadline = Date.now() + 5000;
  while ((await left()) === before) assert.ok(Date.now() < deadline, "the request still runs");
});
