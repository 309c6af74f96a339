// Vercel's `ai` against the server: through @ai-sdk/openai-compatible, and @ai-sdk/openai with chat and responses.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { asked, assertArguments, assertSameText, baseURL, model } from "./common.mjs";

const compatible = createOpenAICompatible({
  name: "vblora", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });
const models = {
  compatible: (id) => compatible(id),
  "openai chat": (id) => openai.chat(id),
  "openai responses": (id) => openai.responses(id),
};
const once = { maxRetries: 0, temperature: 0 };
const short = { ...once, prompt: asked.question, maxOutputTokens: asked.max_tokens };
const schema = jsonSchema(asked.tool.parameters);
const calling = { ...once, prompt: asked.request };

const booking = (execute) => ({
  [asked.tool.name]: tool({ description: asked.tool.description, inputSchema: schema, execute }),
});

async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

for (const [name, make] of Object.entries(models)) {
  test(`${name}: streams the answer that it gets in one piece`, async () => {
    const whole = await generateText({ ...short, model: make(model) });
    const streamed = streamText({ ...short, model: make(model) });
    assertSameText(await collect(streamed.textStream), whole.text);
    assert.equal(await streamed.finishReason, whole.finishReason);
    const usage = await streamed.usage;
    assert.equal(usage.outputTokens, whole.usage.outputTokens);
    assert.ok(usage.inputTokens > 10 && usage.outputTokens > 5);
  });

  test(`${name}: an object of a schema`, async () => {
    const given = { ...calling, output: Output.object({ schema, name: "booking" }) };
    assertArguments((await generateText({ ...given, model: make(model) })).output);
    const streamed = streamText({ ...given, model: make(model) });
    const objects = await collect(streamed.partialOutputStream);
    assertArguments(objects.at(-1));
  });

  test(`${name}: an unknown model is an API error`, async () => {
    const unknown = generateText({ ...short, model: make(asked.unknown) });
    await assert.rejects(unknown, (error) => APICallError.isInstance(error) && error.statusCode === 404);
    const errors = [];
    const streamed = streamText({ ...short, model: make(asked.unknown), onError: ({ error }) => errors.push(error) });
    await collect(streamed.textStream);
    assert.equal(errors[0].statusCode, 404);
    assert.match(errors[0].message, new RegExp(asked.unknown));
  });
}

for (const [name, make] of Object.entries(models).filter(([name]) => name !== "openai responses")) {
  test(`${name}: streams a tool call`, async () => {
    const streamed = streamText({ ...calling, model: make(model), tools: booking(), toolChoice: "required" });
    const parts = await collect(streamed.fullStream);
    const inputs = parts.filter((part) => part.type === "tool-input-delta");
    const [call, ...others] = parts.filter((part) => part.type === "tool-call");
    assert.deepEqual(others, []);
    assert.equal(call.toolName, asked.tool.name);
    assertArguments(call.input);
    assert.ok(inputs.length > 2, `only ${inputs.length} parts`);
    assert.deepEqual(JSON.parse(inputs.map((part) => part.delta).join("")), call.input);
    assert.equal(await streamed.finishReason, "tool-calls");
  });

  test(`${name}: runs a named tool and goes on with its result`, async () => {
    const booked = [];
    const tools = booking((given) => (booked.push(given), asked.result));
    const choice = ({ stepNumber }) => ({
      toolChoice: stepNumber === 0 ? { type: "tool", toolName: asked.tool.name } : "none",
    });
    const given = { ...calling, maxOutputTokens: 48, tools, prepareStep: choice, stopWhen: stepCountIs(2) };
    const { steps, text } = await generateText({ ...given, model: make(model) });
    assert.equal(booked.length, 1);
    assertArguments(booked[0]);
    assert.equal(steps.length, 2);
    assert.equal(steps[0].toolResults[0].output, asked.result);
    assert.ok(text);
  });
}

test("openai responses: tools are refused by name", async () => {
  const refused = generateText({ ...calling, model: openai.responses(model), tools: booking() });
  await assert.rejects(refused, (error) => error.statusCode === 400 && error.data.error.param === "tools");
});

test("compatible: a completion", async () => {
  const completion = compatible.completionModel(model);
  const whole = await generateText({ ...short, model: completion });
  const streamed = streamText({ ...short, model: completion });
  assertSameText(await collect(streamed.textStream), whole.text);
});

test("compatible: embeddings", async () => {
  const embedding = compatible.textEmbeddingModel(model);
  const { embeddings } = await embedMany({ model: embedding, values: [asked.question, asked.request], maxRetries: 0 });
  assert.equal(embeddings.length, 2);
  assert.ok(embeddings.every((entry) => entry.length === 640 && entry.every(Number.isFinite)));
});
