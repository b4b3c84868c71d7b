// A node writes into itself while it runs. The page forgets that text when a graph is loaded again or a change is undone,
// and a node whose result ComfyUI still has does not run again. What comes with the kept result is written here.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// "5", or "12:5" for node 5 of the subgraph that node 12 is.
function nodeOf(id) {
    let node = null, graph = app.rootGraph ?? app.graph;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node;
}

api.addEventListener("executed", ({ detail }) => {
    const { text, images } = detail?.output ?? {}, nodeId = detail?.display_node ?? detail?.node;
    const node = text && !images && nodeOf(nodeId); // the inspector's words are in its picture
    // The page looks for the node in the graph on screen alone: another workflow's may have the same number there.
    if (node?.comfyClass?.startsWith("LanceNative") && node.graph === app.canvas.graph)
        api.dispatchCustomEvent("progress_text", { nodeId, text: text[0], prompt_id: detail.prompt_id });
});
