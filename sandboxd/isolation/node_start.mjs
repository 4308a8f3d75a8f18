// Starts an MCP server whose command line holds secrets: they come in the environment, and are put
// into process.argv here, where no other process can read them (proc(5), /proc/pid/cmdline).
import { pathToFileURL } from "node:url";

const [program, ...words] = JSON.parse(process.argv[2]);
process.argv.splice(
  1,
  process.argv.length,
  program,
  ...words.map(([before, name]) => (name ? before + process.env[name] : before)),
);
await import(pathToFileURL(program).href);
