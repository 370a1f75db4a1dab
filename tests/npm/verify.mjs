// Reads one JSON a line, {secret, headers, body}, and says for each whether the library takes it: `true` or its error.
import { createInterface } from "node:readline";
import { Webhook } from "standardwebhooks";

for await (const line of createInterface({ input: process.stdin })) {
  const { secret, headers, body } = JSON.parse(line);
  let verdict = true;
  try {
    new Webhook(secret).verify(body, headers);
  } catch (error) {
    verdict = String(error.message);
  }
  console.log(JSON.stringify(verdict));
}
