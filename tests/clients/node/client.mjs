// A user of the unmodified Node MCP SDK, as an agent or over HTTP. Prints what it saw as one JSON object.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const texts = (result) => result.content.map((block) => block.text);
const saw = { environment: Object.keys(process.env).sort() };

const { MCP_URL, MCP_TOKEN } = process.env;
const transport = MCP_URL
  ? new StreamableHTTPClientTransport(new URL(MCP_URL), {
      requestInit: { headers: { Authorization: `Bearer ${MCP_TOKEN}` } },
    })
  : new StdioClientTransport({
      command: "sandboxd-mcp",
      env: { PATH: process.env.PATH, SANDBOXD_SOCKET: process.env.SANDBOXD_SOCKET },
    });
const client = new Client({ name: "agent", version: "1.0.0" });
await client.connect(transport);

saw.server = client.getServerVersion().name;
await client.ping();
const { tools } = await client.listTools();
saw.tools = Object.fromEntries(tools.map((tool) => [tool.name, tool.annotations?.title ?? null]));

const used = await client.callTool({ name: "use", arguments: { word: "grüße" } });
saw.used = [used.isError ?? false, texts(used)];
const failed = await client.callTool({ name: "fail", arguments: {} });
saw.failed = [failed.isError ?? false, texts(failed)];
const refused = await client.callTool({ name: "use", arguments: { word: 5 } });
saw.refused = [refused.isError ?? false, texts(refused)];
try {
  await client.callTool({ name: "nothing", arguments: {} });
} catch (error) {
  saw.unknown = [error.code, error.message];
}

saw.progress = [];
await client.callTool({ name: "talk", arguments: {} }, undefined, {
  onprogress: (step) => saw.progress.push(step.message),
});

const abort = new AbortController();
setTimeout(() => abort.abort(), 1000);
try {
  await client.callTool({ name: "long", arguments: {} }, undefined, { signal: abort.signal });
} catch {
  saw.cancelled = true;
}
saw.again = texts(await client.callTool({ name: "use", arguments: { word: "again" } }));
await client.close();
process.stdout.write(JSON.stringify(saw));
