// A node writes into itself while it runs. The page forgets that text when a graph is loaded again or a change is undone,
// and a node whose result ComfyUI still has does not run again. What comes with the kept result is written here.
import { api } from "../../scripts/api.js";

api.addEventListener("executed", ({ detail }) => {
    const text = detail?.output?.lance_text?.[0];
    if (text) api.dispatchCustomEvent("progress_text", { nodeId: detail.node, text });
});
