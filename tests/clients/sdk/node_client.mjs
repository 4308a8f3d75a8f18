// What the unmodified SDK sees of a sandbox's whole life, as one line of JSON.
import { AgentClient } from "@21st-sdk/node"

const [baseUrl, apiKey] = [process.env.BASE_URL, process.env.API_KEY]
const client = new AgentClient({ apiKey, baseUrl })
const { sandboxes, tokens } = client
const saw = {}

async function message(work) {
  try {
    return { gave: await work() }
  } catch (error) {
    return error.message
  }
}

const made = await sandboxes.create({
  agent: "worker",
  files: { "notes/a.txt": "from the client\n" },
  envs: { GREETING: "hello" },
  setup: ["cp notes/a.txt b.txt"],
  timeoutMs: 600000,
})
const sandboxId = made.sandboxId
saw.made = made
saw.detail = await sandboxes.get(sandboxId)
saw.exec = await sandboxes.exec({
  sandboxId,
  command: 'echo "$GREETING $MORE" in "$PWD"; echo oops >&2; exit 7',
  cwd: "/workspace/notes",
  envs: { MORE: "more" },
  timeoutMs: 20000,
})
saw.late = await sandboxes.exec({ sandboxId, command: "sleep 60", timeoutMs: 200 })
const { files } = sandboxes
saw.setup = await files.read({ sandboxId, path: "b.txt" })
saw.written = (await files.write({ sandboxId, files: { "d/one.txt": "1", "d/ü.txt": "ü" } })) ?? null
saw.read = await files.read({ sandboxId, path: "/workspace/d/ü.txt" })
saw.list = await files.list({ sandboxId, path: "/workspace", depth: 2 })
saw.info = await files.getInfo({ sandboxId, path: "d/one.txt" })
saw.exists = [
  await files.exists({ sandboxId, path: "d/one.txt" }),
  await files.exists({ sandboxId, path: "d/none.txt" }),
]
saw.dirs = [
  await files.makeDir({ sandboxId, path: "e/f" }),
  await files.makeDir({ sandboxId, path: "e/f" }),
]
saw.renamed = await files.rename({ sandboxId, oldPath: "d/one.txt", newPath: "e/1.txt" })
saw.removed = (await files.remove({ sandboxId, path: "d" })) ?? null
saw.left = await files.exists({ sandboxId, path: "d" })

const token = await tokens.create({ agent: "worker", userId: "u-1", expiresIn: "15m" })
saw.token = token
saw.capped = await tokens.create({ expiresIn: "48h" }) // a day at most
const user = new AgentClient({ apiKey: token.token, baseUrl: baseUrl + "/" })
const own = await user.sandboxes.create({ agent: "worker" })
saw.user = (await user.sandboxes.get(own.id)).status
saw.userDeleted = (await user.sandboxes.delete(own.id)) ?? null

const wrong = new AgentClient({ apiKey: "an_sk_" + "0".repeat(64), baseUrl })
saw.errors = {
  key: await message(() => wrong.sandboxes.get(sandboxId)),
  keyOfToken: await message(() => wrong.tokens.create()),
  agent: await message(() => sandboxes.create({ agent: "nobody" })),
  foreign: await message(() => sandboxes.create({ agent: "foreign" })),
  sandbox: await message(() => sandboxes.get("s-0000000000000000")),
  file: await message(() => files.read({ sandboxId, path: "none" })),
  outside: await message(() => files.write({ sandboxId, files: { "../../etc/x": "x" } })),
  setup: await message(() => sandboxes.create({ agent: "worker", setup: ["exit 3"] })),
  network: await message(() =>
    sandboxes.create({ agent: "worker", networkAllowOut: ["example.com"] }),
  ),
  expires: await message(() => tokens.create({ expiresIn: "soon" })),
  mint: await message(() => user.tokens.create()),
  scope: await message(() => user.sandboxes.create({ agent: "second" })),
  others: await message(() => user.sandboxes.get(sandboxId)),
  threads: await message(() => client.threads.create({ sandboxId, name: "x" })),
}

saw.deleted = (await sandboxes.delete(sandboxId)) ?? null
saw.after = await sandboxes.get(sandboxId)
console.log(JSON.stringify(saw))
