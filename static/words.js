// The texts of scripts. They are English; `make messages` extracts them into the catalogue of the templates.

// `text` with each %(name)s replaced by the value of that name.
export const _ = (text, values = {}) => text.replace(/%\((\w+)\)s/g, (_match, name) => values[name])
