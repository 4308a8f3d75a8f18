// What the unmodified Next.js token handler answers a browser, as one line of JSON.
import { createTokenHandler, exchangeToken } from "@21st-sdk/nextjs/server"

const [relayUrl, apiKey] = [process.env.RELAY_URL, process.env.API_KEY]
const saw = {}

async function answered(handler, body) {
  const request = new Request("http://localhost/api/agent/token", {
    method: "POST",
    body: JSON.stringify(body),
  })
  const response = await handler(request)
  return { status: response.status, body: await response.json() }
}

saw.exchanged = await exchangeToken({ apiKey, relayUrl, agent: "worker", userId: "u-1" })
const handler = createTokenHandler({ apiKey, relayUrl, expiresIn: "5m" })
saw.handled = await answered(handler, { agent: "worker", userId: "u-2" })
saw.nobody = await answered(handler, { agent: "nobody" })
const wrong = createTokenHandler({ apiKey: "an_sk_" + "0".repeat(64), relayUrl })
saw.wrong = await answered(wrong, {})
const soon = createTokenHandler({ apiKey, relayUrl, expiresIn: "soon" })
saw.soon = await answered(soon, { userId: "u-3" })
// At the other client's path: told apart where both an agent and a user are named.
const shared = createTokenHandler({ apiKey, relayUrl: relayUrl.replace("/nextjs", "") })
saw.shared = await answered(shared, { agent: "nobody", userId: "u-4" })
saw.sharedGood = await answered(shared, { agent: "worker" })
console.log(JSON.stringify(saw))
