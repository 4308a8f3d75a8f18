// The suite sends no credentials: every request of the process gets the token of its environment.
import { getGlobalDispatcher, setGlobalDispatcher } from "undici";

const bearer = `Bearer ${process.env.MCP_TOKEN}`;
const added = (headers) => {
  if (Array.isArray(headers)) return [...headers, "authorization", bearer];
  const pairs = headers?.[Symbol.iterator] ? Object.fromEntries(headers) : headers;
  return { ...pairs, authorization: bearer };
};
setGlobalDispatcher(
  getGlobalDispatcher().compose((dispatch) => (options, handler) =>
    dispatch({ ...options, headers: added(options.headers) }, handler),
  ),
);
