-- wrk -s wrk.lua URL -- FILE...: send the files in turn, and print one JSON line.
local threads, bodies, turn = {}, {}, 0

function setup(thread)
  table.insert(threads, thread)
end

function init(names)
  counts = {}
  for _, name in ipairs(names) do
    local file = assert(io.open(name, "rb"))
    table.insert(bodies, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #bodies + 1
  return wrk.format("POST", nil, {["Content-Type"] = "image/jpeg"}, bodies[turn])
end

function response(status)
  counts[status] = (counts[status] or 0) + 1
end

function done(summary, latency)
  local codes = {}
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("counts")) do
      codes[status] = (codes[status] or 0) + count
    end
  end
  local texts = {}
  for status, count in pairs(codes) do
    table.insert(texts, string.format('"%d": %d', status, count))
  end
  local answered = codes[200] or 0
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  if broken > 0 then
    table.insert(texts, string.format('"none": %d', broken))
  end
  print(string.format(
    '{"images_per_s": %.3f, "answered": %d, "all_answered": %d, "p50_ms": %.3f, "p99_ms": %.3f, "codes": {%s}}',
    answered / summary.duration * 1e6, answered, answered,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, table.concat(texts, ", ")))
end
