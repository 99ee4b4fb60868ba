// Streams one answer through npm's ehbp and the official openai client; prints what came as JSON. Run by the tests.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.argv[3] + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);

async function main(url) {
  const { createTransport } = await load("ehbp");
  const { OpenAI } = await load("openai");
  const transport = await createTransport(url);
  const fetch = (input, init) => transport.request(input, init);
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0, fetch });
  const messages = [{ role: "user", content: "What is 47 plus 38?" }];
  const stream = await client.chat.completions.create({ model: "toy", messages, max_tokens: 12, stream: true });
  const choices = [];
  for await (const chunk of stream) if (chunk.choices.length) choices.push(chunk.choices[0]);
  const text = choices.map((choice) => choice.delta.content ?? "").join("");
  const finish_reason = choices.map((choice) => choice.finish_reason ?? "").join("");
  return { text, num_parts: String(choices.length), finish_reason };
}

main(process.argv[2])
  .catch((error) => ({ error: error.constructor.name, message: String(error).slice(0, 300) }))
  .then((found) => console.log(JSON.stringify(found)));
