-- Takes a name's place in its project's index, if there is room for it.
-- KEYS: samples, names. ARGV: name, num_samples, max_experiments, max_project_samples, now in seconds.
-- Returns "reserved"; or what there is none for ("experiments" or "samples") and how many the project has of it.
local others, count = 0, 0
local held = redis.call('HGETALL', KEYS[1])
local mine = tonumber(ARGV[2])
for i = 1, #held, 2 do
  local num_samples = tonumber(string.match(held[i + 1], '^%d+'))
  if held[i] == ARGV[1] then
    mine = math.max(mine, num_samples) -- whoever else is creating it may be the one who does
  else
    others, count = others + num_samples, count + 1
  end
end
if count >= tonumber(ARGV[3]) then
  return {'experiments', string.format('%.0f', count)}
end
if others + mine > tonumber(ARGV[4]) then
  return {'samples', string.format('%.0f', others)}
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %.0f', mine, ARGV[5]))
redis.call('ZADD', KEYS[2], 0, ARGV[1])
return {'reserved', '0'}
