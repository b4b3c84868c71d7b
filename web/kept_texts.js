// A node writes into itself while it runs. The page takes that text away when a run has ended (1.57 and newer), a graph is
// loaded again or a change is undone, and a node whose result ComfyUI still has does not run again. Here it is written again,
// and also into the box (the subgraph) that the node is in, where that is what one sees.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const texts = new WeakMap(); // node -> its id in a run, and what came for it last

// Of node "12:5" that is ours: [5, "12:5"], and [12, "12"], the box that it is in.
function holdersOf(id) {
    const holders = [];
    let graph = app.rootGraph ?? app.graph, path = "";
    for (const part of String(id).split(":")) {
        const node = graph?.getNodeById(part);
        path = path ? `${path}:${part}` : part;
        if (node) holders.unshift([node, path]);
        graph = node?.subgraph;
    }
    return holders[0]?.[0].comfyClass?.startsWith("LanceNative") ? holders : [];
}

function keep(id, text) {
    const holders = holdersOf(id);
    for (const [node, path] of holders) texts.set(node, [path, text]);
    return holders;
}

// Inside a box that is open, pages before 1.57 stumble over the number.
function finds(nodeId) {
    const [major, minor] = window.__COMFYUI_FRONTEND_VERSION__.split(".").map(Number);
    return major > 1 || minor >= 57 || !nodeId.includes(":");
}

// The page looks for the node in the graph on screen alone: another workflow's may have the same number there.
function write(node, nodeId, text) {
    if (node.graph === app.canvas.graph && finds(nodeId)) api.dispatchCustomEvent("progress_text", { nodeId, text });
}

function writeAgain() {
    for (const node of app.canvas.graph.nodes) if (texts.has(node)) write(node, ...texts.get(node));
}

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
    const [, ...boxes] = keep(nodeId, text); // the page has written into the node itself
    for (const [box, path] of boxes) write(box, path, text);
});

api.addEventListener("executed", ({ detail }) => {
    const { text, images } = detail?.output ?? {}, nodeId = detail?.display_node ?? detail?.node;
    if (text && !images) // the inspector's words are in its picture
        for (const [node, path] of keep(nodeId, text[0])) write(node, path, text[0]);
});

for (const end of ENDS) api.addEventListener(end, () => setTimeout(writeAgain)); // after the page's own

app.registerExtension({
    name: "LanceNative.KeptTexts",
    setup() {
        app.canvas.canvas.addEventListener("subgraph-opened", () => setTimeout(writeAgain));
    },
    // Another workflow, or a change undone: new nodes, for which the page has the last results, as soon as it is done.
    afterConfigureGraph() {
        setTimeout(() => {
            for (const node of app.canvas.graph.nodes) {
                const { text, images } = app.nodeOutputs?.[node.id] ?? {};
                if (node.comfyClass?.startsWith("LanceNative") && text && !images) texts.set(node, [String(node.id), text[0]]);
            }
            writeAgain();
        });
    },
});
