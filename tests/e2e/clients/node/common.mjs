// What all clients are asked, and where the server is. Knows no client.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

export const { BASE_URL: baseURL, MODEL: model } = process.env;
assert.ok(baseURL && model, "BASE_URL and MODEL say which server and model to ask"); // else clients ask their vendor's
export const asked = JSON.parse(readFileSync(new URL("../asked.json", import.meta.url), "utf8"));

/** What an answer in several parts must be: more than a few, and together the text of the answer in one piece. */
export function assertSameText(parts, whole) {
  assert.ok(whole.length > 20, `a short answer shows little: ${whole}`);
  assert.ok(parts.length > 5, `only ${parts.length} parts`);
  assert.equal(parts.join(""), whole);
}

/** Arguments, parsed, of a call of the tool in asked.json: they must match its schema. */
export function assertArguments({ part, day, ...others }) {
  assert.ok(asked.tool.parameters.properties.part.enum.includes(part), `part ${part}`);
  assert.ok(Number.isInteger(day) && day >= 1 && day <= 28, `day ${day}`);
  assert.deepEqual(others, {});
}

/** How many requests ended on the server because their client had gone. */
export async function left() {
  const metrics = await (await fetch(new URL("/metrics", baseURL))).text();
  return Number(/^vblora_request_success_total\{finished_reason="abort"\} (\S+)$/m.exec(metrics)?.[1] ?? 0);
}
