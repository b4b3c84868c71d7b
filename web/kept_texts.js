// A node writes into itself while it runs. The page takes that text away when the run has ended (1.57 and newer), a graph is
// loaded again or a change is undone, and a node whose result ComfyUI still has does not run again. Here it is written again.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const texts = new Map(); // node -> what came for it last in this run

// "5", or "12:5" for node 5 of the subgraph that node 12 is.
function nodeOf(id) {
    let node = null, graph = app.rootGraph ?? app.graph;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node?.comfyClass?.startsWith("LanceNative") ? node : null;
}

// The page looks for the node in the graph on screen alone: another workflow's may have the same number there.
function write(node, nodeId, text) {
    if (node?.graph === app.canvas.graph) api.dispatchCustomEvent("progress_text", { nodeId, text });
}

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
    const node = nodeOf(nodeId);
    if (node) texts.set(node, [nodeId, text]);
});

api.addEventListener("executed", ({ detail }) => {
    const { text, images } = detail?.output ?? {}, nodeId = detail?.display_node ?? detail?.node;
    if (text && !images) write(nodeOf(nodeId), nodeId, text[0]); // the inspector's words are in its picture
});

for (const end of ENDS)
    api.addEventListener(end, () => setTimeout(() => { // after the page's own
        for (const [node, [nodeId, text]] of texts) write(node, nodeId, text);
        texts.clear();
    }));
