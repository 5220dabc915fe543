// Streams one answer of the OpenAI API.
import { askForKey, authorization } from "./feed.js";

export class Refusal extends Error {}

async function post(path, body, headers, signal) {
  const response = await fetch(path, {
    method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...authorization(), ...headers },
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const answer = await response.json().catch(() => null);
  throw new Refusal(answer?.error?.message || `The server answers with status ${response.status}.`);
}

// Whether the served model has a chat template; null when the server cannot say now.
export async function hasChatTemplate(model) {
  try {
    await post("tokenize", { model, messages: [{ role: "user", content: "a" }] }, {});
    return true;
  } catch (error) { return error instanceof Refusal && /no chat template/.test(error.message) ? false : null; }
}

export async function servedModels() {
  const response = await fetch("v1/models", { headers: authorization() });
  return response.ok ? (await response.json()).data.map((card) => card.id) : [];
}

// Calls `onText` with each piece. Returns {reason, usage, error}: how it ended; `error` when the stream said so.
export async function stream(path, body, requestId, signal, onText) {
  const response = await post(path, { ...body, stream: true, stream_options: { include_usage: true } }, { "X-Request-Id": requestId }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const end = { reason: "", usage: null, error: "" };
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : "";
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) { end.error = chunk.error.message; continue; }
      end.usage = chunk.usage ?? end.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const text = choice.text ?? choice.delta?.content ?? "";
      if (text) onText(text);
      end.reason = choice.finish_reason ?? end.reason;
    }
  }
  if (!end.reason && !end.error) end.error = "The connection ended before the answer did.";
  return end;
}
