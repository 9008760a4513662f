// The views of a picture that this page offers: for download and as curl commands.
//
// A view is {name, parameters, type, accept, title, file}. `name`: the value of the request's
// parameter `view`; `parameters`: the names of the other parameters that the view takes; `type`:
// the media type that this page asks for; `accept`: the Accept header of the curl command.
// Without `name` or `accept` the server's default applies.

/** The whole mask. Every result contains it, so this page offers it without GET /views. */
export const MASK = { parameters: [], title: "Mask", file: "mask.png" };

/** The statistics of each class. Offered as a curl command only. */
export const STATISTICS = {
  parameters: [], accept: "application/json", title: "JSON", file: "answer.json",
};

/** The image views of an answer to GET /views, in its order, except the mask. */
export function imageViews(served) {
  return served
    .filter(({ name, media_types: [type] }) => name !== "mask" && type.startsWith("image/"))
    .map(({ name, media_types: [type], parameters }) => ({
      name,
      parameters,
      type,
      title: name[0].toUpperCase() + name.slice(1),
      file: `${name}.${type.split("/")[1]}`,
    }));
}
